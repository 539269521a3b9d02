"""The block pool on random traces, against prefixes kept in plain lists."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.serving.blocks import BlockPool

SIZE = 4


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=18), st.booleans())))
def test_what_is_matched_is_what_was_written(n_blocks: int, texts: list[tuple[list[int], bool]]) -> None:
    """Blocks are filled as a model would fill them; a match must hold exactly the tokens asked for, and none may leak."""
    pool = BlockPool(n_blocks, SIZE)
    content: dict[int, list[int]] = {}
    held: list[list[int]] = []
    for tokens, stays in texts:
        match = pool.match(pool.root("model"), tokens, len(tokens) - 1)
        for place, block in enumerate(match.blocks):
            assert content[block] == tokens[place * SIZE : (place + 1) * SIZE]
        n_known = len(match.blocks) * SIZE
        needed = -(-len(tokens) // SIZE) - len(match.blocks)
        if needed > pool.n_free:
            pool.release(match.blocks)
            continue
        if match.partial is not None:
            source, n_same = match.partial
            assert 0 < n_same < SIZE or n_known + n_same == len(tokens) - 1
            assert content[source][:n_same] == tokens[n_known : n_known + n_same]
        blocks = [*match.blocks, *(pool.take() for _ in range(needed))]
        # Nobody gets a block that another holds, unless it is a shared prefix.
        assert not {*blocks[len(match.blocks) :]} & {block for other in held for block in other}
        node = match.node
        for place in range(len(match.blocks), len(blocks)):
            content[blocks[place]] = tokens[place * SIZE : (place + 1) * SIZE]
            if len(content[blocks[place]]) == SIZE:
                node = pool.remember(node, tuple(content[blocks[place]]), blocks[place])
        if stays:
            held.append(blocks)
        else:
            pool.release(blocks)
        assert pool.n_free == n_blocks - len({block for other in held for block in other})
    for blocks in held:
        pool.release(blocks)
    assert pool.n_free == n_blocks


def test_the_prefix_that_was_let_go_first_is_forgotten_first() -> None:
    pool = BlockPool(3, SIZE)
    for first in range(3):
        block = pool.take()
        pool.remember(pool.root("model"), (first,) * SIZE, block)
        pool.release([block])
    pool.take()
    known = [bool(pool.match(pool.root("model"), [first] * 5, 4).blocks) for first in range(3)]
    assert known == [False, True, True]


def test_another_key_shares_nothing() -> None:
    pool = BlockPool(4, SIZE)
    pool.remember(pool.root(("a", 1)), (1, 2, 3, 4), pool.take())
    assert pool.match(pool.root(("a", 1)), [1, 2, 3, 4, 5], 4).blocks
    for key in (("b", 1), ("a", 2), (None, 1)):
        assert not pool.match(pool.root(key), [1, 2, 3, 4, 5], 4).blocks
    pool.forget_root(("a", 1))
    assert not pool.match(pool.root(("a", 1)), [1, 2, 3, 4, 5], 4).blocks
