"""The token tree on rank 0: parents and tokens are its facts, everything else is derived. Pure."""

from __future__ import annotations


class Node:
    """A node is one drafted token.

    `score` is the log of the probability that it will be accepted. It is not relative to the root,
    so only differences count."""

    __slots__ = ("children", "expanded", "id", "parent", "position", "score", "sent", "token")

    def __init__(self, id: int, parent: int, token: int, position: int, score: float):
        self.id, self.parent, self.token, self.position, self.score = (
            id,
            parent,
            token,
            position,
            score,
        )
        self.sent = False
        self.expanded = False
        self.children: dict[int, Node] = {}  # token -> child


class TokenTree:
    """This is a tree whose ids are never used twice. Its root's parent is the last committed
    node."""

    def __init__(self, token: int, position: int):
        self._last = 0
        self.drafted = 0  # nodes ever added
        self.root = Node(0, -1, token, position, 0.0)
        self.nodes: dict[int, Node] = {0: self.root}

    def __contains__(self, id: int) -> bool:
        return id in self.nodes

    def __len__(self) -> int:
        return len(self.nodes)

    def depth(self, node: Node) -> int:
        return node.position - self.root.position

    def add(self, parent: Node, token: int, score: float) -> Node:
        """Return the child of `parent` with this token.

        It is made, with this score, if it is absent."""
        child = parent.children.get(token)
        if child is None:
            self._last += 1
            self.drafted += 1
            child = Node(self._last, parent.id, token, parent.position + 1, score)
            parent.children[token] = child
            self.nodes[child.id] = child
        return child

    def reroot(self, root: Node) -> None:
        """Keep `root` and its descendants.

        The work is in proportion to what dies, not to what lives, so each node costs it only
        once."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node is not root:
                del self.nodes[node.id]
                stack.extend(node.children.values())
        self.root = root

    def restart(self, anchor: int, token: int, position: int) -> None:
        """Keep nothing: make a new root below the committed node `anchor`."""
        self._last += 1
        self.root = Node(self._last, anchor, token, position, 0.0)
        self.nodes = {self.root.id: self.root}

    def validate(self) -> None:
        """Assert the invariants: every node hangs below the root, ids grow downwards, and what was
        sent has sent parents."""
        reached = 1
        for node in self.nodes.values():
            if not node.children:
                continue
            reached += len(node.children)
            for token, child in node.children.items():
                assert (
                    self.nodes[child.id] is child
                    and child.parent == node.id
                    and child.token == token
                )
                assert child.id > node.id and child.position == node.position + 1
                assert child.score <= node.score, "a child may not outrank its parent"
                assert node.sent or not child.sent, "a child may not be sent before its parent"
        assert reached == len(self.nodes), "a node outside the tree"
