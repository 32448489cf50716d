"""A drafter with one request at a time."""


class Alone:
    """What is asked of the drafter is of the session that began last."""

    def __init__(self, drafter):
        self.drafter, self.session = drafter, None

    def begin(self, *about) -> None:
        self.session = self.drafter.begin(*about)

    def propose(self, nodes):
        [answer] = self.drafter.propose([(self.session, nodes)])
        return answer

    def commit(self, *about) -> None:
        self.session.commit(*about)

    def learn(self, features) -> None:
        self.session.learn(features)
