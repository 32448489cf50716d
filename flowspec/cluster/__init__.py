"""Several machines: which hosts there are, what each of them needs, and a run over all of them."""
