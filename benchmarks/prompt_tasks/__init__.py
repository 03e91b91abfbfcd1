"""Tasks for prompt search whose model is a local server: what it answers depends on the rules in its system prompt.

One idea: everything is decided by hashes, so two methods that send the same requests get the same answers, and a
score is a property of a prompt alone.
One trap: the reflection model adds one rule at a time, so a search that is deeper than wide is at an advantage.
Another: whatever runs beside Agent Lightning imports neither Leyden nor its packages, only `openai`.

`problem.py` says what a task is; `desks.py` and `rooms.py` are the tasks, `reflecting.py` the model that rewrites
prompts, `server.py` serves them all, `apps.py` is the app whose prompts are improved; `leyden_arm.py` and
`agent_lightning_arm.py` improve them; `runs.py` starts all of it.
"""
