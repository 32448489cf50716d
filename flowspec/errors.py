"""Errors whose text is meant for the person at the keyboard. Pure."""


class UserError(Exception):
    """Bad input: printed as one line, exit code 2, no traceback. Names the field or file and what to do."""


class RankLost(Exception):
    """A peer died or hung: the run cannot go on. Names the rank and what is known of the reason."""


def need(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok: the one way a bad setting is reported."""
    if not ok:
        raise UserError(message)
