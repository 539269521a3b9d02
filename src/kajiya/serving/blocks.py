"""Blocks of the paged key-value cache: who holds which, and which prefixes they remember; free of tensors."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass
class Node:
    """A full block's place in the tree of prefixes: its tokens behind those of its parents."""

    block: int | None
    parent: "Node | None"
    tokens: tuple[int, ...]
    children: "dict[tuple[int, ...], Node]" = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """What the cache remembers of a prompt."""

    blocks: tuple[int, ...]
    """Full blocks, in order; now held by whoever asked."""
    node: Node
    """Where the tree goes on behind them."""
    partial: tuple[int, int] | None
    """A block whose first n tokens go on from there, and n: to be copied before it is written."""


class BlockPool:
    """`n_blocks` blocks of `block_tokens` positions, counted by holder.

    A full block stays known by its tokens (and by all before them, the adapter and the version of the weights) when nobody
    holds it any more, until its memory is needed: then the one that was let go first goes. Keys are the tokens
    themselves, not hashes of them: two prefixes are never taken for one another.
    """

    def __init__(self, n_blocks: int, block_tokens: int, remembers: bool = True) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.remembers = remembers
        self.n_resets = 0
        self._holders = [0] * n_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))
        self._nodes: dict[int, Node] = {}
        self._roots: dict[Hashable, Node] = {}

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, remembered ones among them."""
        return len(self._free)

    @property
    def n_remembered(self) -> int:
        """Full blocks that are known by their tokens."""
        return len(self._nodes)

    def is_held(self, block: int) -> bool:
        """Whether anybody holds the block."""
        return self._holders[block] > 0

    def root(self, key: Hashable) -> Node:
        """The empty prefix under `key`: the adapter and the version of the weights."""
        if key not in self._roots:
            self._roots[key] = Node(None, None, ())
        return self._roots[key]

    def match(self, root: Node, tokens: Sequence[int], limit: int) -> Match:
        """The longest remembered prefix of `tokens[:limit]`; its full blocks are held from now on."""
        node, size = root, self.block_tokens
        blocks: list[int] = []
        while self.remembers and (len(blocks) + 1) * size <= limit:
            child = node.children.get(tuple(tokens[len(blocks) * size : (len(blocks) + 1) * size]))
            if child is None:
                break
            node = child
            assert node.block is not None
            blocks.append(node.block)
        for block in blocks:
            self._hold(block)
        rest = tokens[len(blocks) * size : min(limit, (len(blocks) + 1) * size)]
        return Match(tuple(blocks), node, self._partial(node, rest) if rest else None)

    def take(self) -> int:
        """A free block, now held and no longer remembered; `n_free` must not be 0."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._holders[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Hold these blocks once less; those that nobody holds are free, the deepest of a prefix first to be reused."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._nodes:
                    self._free.move_to_end(block, last=False)

    def remember(self, node: Node, tokens: tuple[int, ...], block: int) -> Node:
        """Know `block` as `tokens` behind `node`; the place of these tokens in the tree, which another block may hold already."""
        if not self.remembers:
            return node
        child = node.children.get(tokens)
        if child is None:
            child = node.children[tokens] = Node(block, node, tokens)
            self._nodes[block] = child
        return child

    def forget_root(self, key: Hashable) -> None:
        """Find nothing under `key` any more, as when another adapter takes its name."""
        self._roots.pop(key, None)

    def forget_all(self) -> None:
        """Remember nothing, as after new weights or a failure; what is held stays held."""
        self._nodes.clear()
        self._roots.clear()

    def reset(self) -> None:
        """Every block free, nothing remembered."""
        self.forget_all()
        self.n_resets += 1
        self._holders = [0] * self.n_blocks
        self._free = OrderedDict.fromkeys(range(self.n_blocks))

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._free.pop(block, None)

    def _forget(self, block: int) -> None:
        node = self._nodes.pop(block, None)
        if node is None or node.parent is None:
            return
        if node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]
        # What hangs below can no longer be found. Its blocks come to the front of the free ones when their time comes.
        below = list(node.children.values())
        while below:
            lost = below.pop()
            below.extend(lost.children.values())
            if lost.block is not None and self._nodes.get(lost.block) is lost:
                del self._nodes[lost.block]

    def _partial(self, node: Node, rest: Sequence[int]) -> tuple[int, int] | None:
        best: tuple[int, int] | None = None
        for tokens, child in node.children.items():
            n_same = next((i for i, (a, b) in enumerate(zip(tokens, rest, strict=False)) if a != b), len(rest))
            if child.block is not None and n_same > (best[1] if best else 0):
                best = (child.block, n_same)
        return best
