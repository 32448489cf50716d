"""The ring in virtual time: the same scheduler, policies and stage books as a real run; only time is made up."""
