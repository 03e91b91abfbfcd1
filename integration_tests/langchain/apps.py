"""Users' agents: they know nothing of Leyden. Their prompts hold the truth about who speaks."""

from __future__ import annotations

import asyncio
import operator
import time
import warnings
from typing import Annotated, Any, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from pydantic import SecretStr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from langgraph.prebuilt import create_react_agent


class State(TypedDict, total=False):
    task: str
    log: Annotated[list[str], operator.add]


@tool
async def search(query: str) -> str:
    """Search."""
    await asyncio.sleep(0.002)
    return f"found {query}"


@tool
def search_sync(query: str) -> str:
    """Search."""
    time.sleep(0.002)
    return f"found {query}"


def model(base_url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="user-model", base_url=base_url, api_key=SecretStr("user-key"), **options)


def said(role: str, task: str) -> list[Any]:
    return [SystemMessage(f"role={role}"), HumanMessage(task)]


def react_agent(llm: ChatOpenAI, tools: list[BaseTool], prompt: str, **options: Any) -> Any:
    """Return a ready-made agent of LangGraph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_react_agent(llm, tools, prompt=prompt, **options)


def graph_of(**nodes: Any) -> Any:
    """Compile nodes that run one after the other."""
    graph = StateGraph(State)
    names = list(nodes)
    for name, function in nodes.items():
        graph.add_node(name, function)
    for before, after in zip([START, *names], [*names, END], strict=True):
        graph.add_edge(before, after)
    return graph.compile()


def team(base_url: str, *, is_sync: bool = False, **options: Any) -> Any:
    """A planner, a named agent with three parallel tool calls, and a critic."""
    llm = model(base_url, **options)
    used = search_sync if is_sync else search
    worker = react_agent(llm, [used], f"role=worker call={used.name}*3", name="worker")

    async def planner(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("planner", state["task"]))).text]}

    async def do_work(state: State) -> State:
        result = await worker.ainvoke({"messages": [HumanMessage(state["task"])]})
        return {"log": [result["messages"][-1].text]}

    async def critic(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("critic", state["task"]))).text]}

    def sync_planner(state: State) -> State:
        return {"log": [llm.invoke(said("planner", state["task"])).text]}

    def sync_do_work(state: State) -> State:
        result = worker.invoke({"messages": [HumanMessage(state["task"])]})
        return {"log": [result["messages"][-1].text]}

    def sync_critic(state: State) -> State:
        return {"log": [llm.invoke(said("critic", state["task"])).text]}

    if is_sync:
        return graph_of(planner=sync_planner, do_work=sync_do_work, critic=sync_critic)
    return graph_of(planner=planner, do_work=do_work, critic=critic)
