"""The text of these errors is meant for the person at the keyboard. Pure."""


class UserError(Exception):
    """This is bad input. It is printed as one line, with exit code 2 and no traceback.

    The line names the field or the file, and what to do."""


class RankLost(Exception):
    """A peer died or hung, so the run cannot go on.

    It names the rank, and what is known of the reason."""


def need(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok. All bad settings are reported in this way."""
    if not ok:
        raise UserError(message)
