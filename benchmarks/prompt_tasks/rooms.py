"""The room selector of Agent Lightning 0.3's examples, with a local model in place of gpt-4.1-nano and of the judge.

As there: one tool that lists the rooms with their bookings, 57 tasks to search with, hard constraints, tie-breaks in
the order of the example's oracle prompt (capacity to spare, extra equipment, distance, bookings), and half a point
for a room that would do. Here the rooms and tasks are our own, the prompt is the system message, and the model looks
at a constraint only when its prompt has the rule; without the first rule it does not even ask for the list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.prompt_tasks.problem import Ask, Message, Problem, Task, digest, is_noisy, record, records, text_of

DATE = "2025-10-13"
NO_ROOM = "none"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_rooms_and_availability",
        "description": "Return meeting rooms with capacity, equipment, accessibility, distance and booked time slots.",
        "parameters": {
            "type": "object",
            "properties": {
                "date": {"type": "string", "description": "YYYY-MM-DD"},
                "time": {"type": "string", "description": "HH:MM 24h local"},
                "duration_min": {"type": "integer", "description": "Meeting duration minutes"},
            },
            "required": ["date", "time", "duration_min"],
        },
    },
}

LOOK = "Call get_rooms_and_availability before you choose."
FREE = "Choose only a room that is free for the whole slot."
EQUIPPED = "Choose only a room that has everything that is needed, and is accessible where that is asked for."
SMALLEST = "Of several rooms that fit, take the one with the fewest seats to spare, then the least extra equipment."
NONE = "When no room fits, answer none."
RULES = (LOOK, FREE, EQUIPPED, SMALLEST, NONE)


@dataclass(frozen=True)
class Room:
    """A meeting room."""

    id: str
    capacity: int
    equipment: tuple[str, ...]
    accessible: bool
    distance_m: int
    booked: tuple[tuple[str, int], ...]
    """Start and minutes, on the one day there is."""

    def is_free(self, time: str, minutes: int) -> bool:
        """Say whether no booking overlaps."""
        start = clock(time)
        return not any(
            start < clock(begin) + length and clock(begin) < start + minutes for begin, length in self.booked
        )

    def is_fit(self, task: Task) -> bool:
        """Say whether the equipment and the way in are right."""
        return set(task["needs"]) <= set(self.equipment) and (self.accessible or not task["accessible_required"])

    def rank(self, task: Task) -> tuple[int, int, int, int]:
        """Return what the best of several rooms has least of."""
        extra = len(self.equipment) - len(task["needs"])
        return (self.capacity - task["attendees"], extra, self.distance_m, len(self.booked))


ROOMS = (
    Room("Ash", 4, ("tv", "whiteboard"), True, 14, (("10:00", 60), ("15:00", 60))),
    Room("Beech", 10, ("projector", "whiteboard", "phone"), True, 28, (("09:30", 60), ("11:30", 60))),
    Room("Cedar", 6, ("tv",), False, 20, (("14:00", 90),)),
    Room("Elm", 12, ("screen", "whiteboard", "phone"), True, 44, (("13:00", 60),)),
    Room("Fir", 8, ("projector", "whiteboard"), False, 18, (("10:30", 60), ("15:30", 30))),
    Room("Hazel", 6, ("projector", "whiteboard"), True, 11, (("09:00", 60), ("13:30", 60))),
    Room("Larch", 8, ("tv", "whiteboard", "phone"), True, 9, (("12:00", 90), ("16:30", 30))),
)
NEEDS = ((), ("whiteboard",), ("tv",), ("projector",), ("projector", "whiteboard"), ("phone",), ("tv", "phone"))


def clock(time: str) -> int:
    """Return minutes since midnight."""
    return int(time[:2]) * 60 + int(time[3:])


def fitting(task: Task) -> list[Room]:
    """Return the rooms that meet every hard constraint, the best first."""
    found = [
        room
        for room in ROOMS
        if room.capacity >= task["attendees"] and room.is_free(task["time"], task["duration_min"]) and room.is_fit(task)
    ]
    return sorted(found, key=lambda room: room.rank(task))


def score(task: Task, choice: str) -> float:
    """Return 1 for the best room (or `none` where none fits), 0.5 for one that would do, 0 otherwise."""
    found = [room.id for room in fitting(task)] or [NO_ROOM]
    return 1.0 if choice == found[0] else 0.5 if choice in found else 0.0


def tasks(seed: int, group: str, count: int) -> list[Task]:
    """Draw requests; for about one in eight there is no room."""
    rng = random.Random(f"rooms/{seed}/{group}")
    found: list[Task] = []
    while len(found) < count:
        task = {
            "id": f"{group}{seed}n{len(found)}",
            "date": DATE,
            "time": f"{rng.randrange(9, 17):02d}:{rng.choice(('00', '30'))}",
            "duration_min": rng.choice((30, 60, 90)),
            "attendees": rng.choice((2, 3, 4, 5, 6, 8, 10, 14)),
            "needs": list(rng.choice(NEEDS)),
            "accessible_required": rng.random() < 0.4,
        }
        if fitting(task) or rng.random() < 0.5:
            found.append(task)
    return found


def written(task: Task) -> str:
    """Return the request as the user's message."""
    return record(
        "request",
        task["id"],
        date=task["date"],
        time=task["time"],
        minutes=str(task["duration_min"]),
        people=str(task["attendees"]),
        needs="+".join(task["needs"]) or "nothing",
        accessible="yes" if task["accessible_required"] else "no",
    )


def read(task: str, fields: dict[str, str]) -> Task:
    """Return the request that was written."""
    return {
        "id": task,
        "date": fields["date"],
        "time": fields["time"],
        "duration_min": int(fields["minutes"]),
        "attendees": int(fields["people"]),
        "needs": [need for need in fields["needs"].split("+") if need != "nothing"],
        "accessible_required": fields["accessible"] == "yes",
    }


async def solve(task: Task, ask: Ask) -> float:
    """Choose a room, with the list of rooms where the model asks for it."""
    messages: list[Message] = [{"role": "user", "content": written(task)}]
    reply = await ask("scheduler", messages, [TOOL])
    if calls := reply.get("tool_calls"):
        messages.append(reply)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            listed = json.dumps({"rooms": listing(arguments["time"], arguments["duration_min"])})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": listed})
        reply = await ask("scheduler", messages)
    return score(task, records("choice", text_of(reply)).get(task["id"], {}).get("room", ""))


def listing(time: str, minutes: int) -> list[dict[str, Any]]:
    """Return what the tool returns."""
    return [{**asdict(room), "free": room.is_free(time, minutes)} for room in ROOMS]


def answer(role: str, system: str, messages: Sequence[Message], has_tools: bool) -> Message:
    """Return what the model says: a tool call, or a choice by the rules that it has."""
    heard = next(text_of(message) for message in messages if message["role"] == "user")
    name, fields = next(iter(records("request", heard).items()))
    task = read(name, fields)
    held = set(system.splitlines())
    if LOOK not in held:
        guess = ROOMS[digest("guess", name) % len(ROOMS)].id
        return {"role": "assistant", "content": record("choice", name, room=guess, seen="no")}
    if messages[-1]["role"] != "tool":
        arguments = {key: task[key] for key in ("date", "time", "duration_min")}
        function = {"name": TOOL["function"]["name"], "arguments": json.dumps(arguments)}  # type: ignore[index]  # a dict
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call_{name}", "type": "function", "function": function}],
        }
    rooms = [room for room in ROOMS if room.capacity >= task["attendees"]]
    if FREE in held:
        rooms = [room for room in rooms if room.is_free(task["time"], task["duration_min"])]
    if EQUIPPED in held:
        rooms = [room for room in rooms if room.is_fit(task)]
    if SMALLEST in held:
        rooms = sorted(rooms, key=lambda room: room.rank(task))
    choice = rooms[0].id if rooms else NO_ROOM if NONE in held else ROOMS[0].id
    if is_noisy(system, name):
        choice = ROOMS[digest("guess", name) % len(ROOMS)].id
    return {"role": "assistant", "content": record("choice", name, room=choice, seen="yes")}


def missing(role: str, text: str) -> list[str]:
    """Return the rule for want of which each wrong choice in a text was made."""
    choices = records("choice", text)
    return [
        fault(read(name, fields), choices[name])
        for name, fields in records("request", text).items()
        if name in choices and score(read(name, fields), choices[name].get("room", "")) < 1
    ]


def fault(task: Task, choice: dict[str, str]) -> str:
    """Return the first rule that a wrong choice breaks."""
    if choice.get("seen") != "yes":
        return LOOK
    if not fitting(task):
        return NONE
    room = next((room for room in ROOMS if room.id == choice.get("room")), None)
    if room is not None and not room.is_free(task["time"], task["duration_min"]):
        return FREE
    if room is not None and not room.is_fit(task):
        return EQUIPPED
    return SMALLEST


ROOM_SELECTOR = Problem(
    name="rooms",
    title="Room selector",
    openings={"scheduler": "You are a scheduling assistant."},
    rules={"scheduler": RULES},
    tasks=tasks,
    solve=solve,
    answer=answer,
    missing=missing,
    search_tasks=57,
)
