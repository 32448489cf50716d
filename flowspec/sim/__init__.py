"""The simulator runs the ring in virtual time.

Scheduler, policies and stage books are those of a real run; only time is invented."""
