"""A frame whose owner has closed no longer says who calls."""

from __future__ import annotations

from dataclasses import dataclass

from leyden import context
from leyden.context import Frame, role


@dataclass
class Run:
    is_closed: bool = False


def test_a_stale_frame_gives_way_to_the_one_around_it() -> None:
    outer = Frame(role="outer")
    node, tool = Run(), Run()
    token = context.enter(outer)
    node_frame = Frame(role="node", owner=node, outer=outer)
    context.enter(node_frame)
    context.enter(Frame(role="tool", owner=tool, outer=node_frame))
    assert context.current().role == "tool"  # type: ignore[union-attr]
    tool.is_closed = True
    assert context.current() is node_frame
    node.is_closed = True
    assert context.current() is outer
    context.leave(token)


def test_a_scope_opened_inside_outlives_the_owner_around_it() -> None:
    node = Run()
    token = context.enter(Frame(role="node", owner=node))
    with role("speaker"):
        node.is_closed = True
        assert context.current().role == "speaker"  # type: ignore[union-attr]
    assert context.current() is None
    context.leave(token)
