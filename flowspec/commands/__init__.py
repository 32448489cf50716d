"""There is a file for each sub-command, with its `main(words) -> exit code`.

It reads the command line, calls what does the work, and prints."""

COMMANDS = {
    "run": "generate text over the ring of stages",
    "cluster": "the same over several machines, by ssh (run_cluster.sh)",
    "generate": "generate text in one process, without ranks: ar, speculative",
    "serve": "serve the model by OpenAI's HTTP interface, over the ring",
    "verify": "prove that speculation changes no token",
    "bench": "compare methods on the same prompts in one call (bench compare CONFIG)",
    "eval": "ask questions of several datasets of several methods, with a report (docs/eval.md)",
    "simulate": "predict tokens/s of any ring and method in virtual time",
    "estimate": "measure how good and how fast a pair of models is (estimate acceptance|latency)",
    "doctor": "say what is wrong with this machine, or the hosts of a cluster file",
    "plan": "say which layers go to which host of a cluster file, and how fast that is",
    "trace": "say where the time of a traced run went, and draw it",
    "split": "cut a checkpoint into a file a stage (split_models.py)",
}
"""This maps the name of a sub-command, which is also the module's, to what it is for."""
