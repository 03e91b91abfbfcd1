"""An agent on Anthropic's own client, in an environment without Leyden: counts, streams, calls a tool, is judged."""

import json
import os
from pathlib import Path

import anthropic

TOOLS = [{"name": "columns", "input_schema": {"type": "object", "properties": {"table": {"type": "string"}}}}]


def main() -> None:
    """Answer the task and write the reward."""
    task = json.loads(os.environ["LEYDEN_TASK"])
    client = anthropic.Anthropic()
    messages = [{"role": "user", "content": task["question"]}]
    while True:
        asked = {"model": "any", "system": "[[role=main]]", "messages": messages, "tools": TOOLS}
        counted = client.messages.count_tokens(**asked).input_tokens
        with client.messages.stream(max_tokens=500, **asked) as stream:
            heard = "".join(stream.text_stream)
            answer = stream.get_final_message()
        assert answer.usage.input_tokens == counted, (answer.usage, counted)
        assert heard == "".join(block.text for block in answer.content if block.type == "text")
        uses = [block for block in answer.content if block.type == "tool_use"]
        if not uses:
            break
        messages.append({"role": "assistant", "content": answer.content})
        messages.append({"role": "user", "content": [result(task["schema"], use) for use in uses]})
    Path(os.environ["LEYDEN_REWARD_FILE"]).write_text(
        json.dumps({"reward": heard == task["expected"], "agreed": judge(task["question"], heard) == "yes"})
    )


def result(schema: str, use: anthropic.types.ToolUseBlock) -> dict[str, object]:
    """Return what the tool answers."""
    found = [line for line in schema.split("\n") if line.startswith(f"{use.input['table']}(")]
    content = found[0] if found else "no such table"
    return {"type": "tool_result", "tool_use_id": use.id, "content": content, "is_error": not found}


def judge(question: str, answer: str) -> str:
    """Let the second agent judge, without a stream."""
    address = os.environ["LEYDEN_BASE_URL_CRITIC"].removesuffix("/v1")
    client = anthropic.Anthropic(base_url=address, api_key=os.environ["LEYDEN_API_KEY_CRITIC"])
    turns = [{"role": "user", "content": f"{question}\n{answer}"}]
    said = client.messages.create(model="any", max_tokens=9, system="[[role=critic]]", messages=turns)
    return said.content[0].text


if __name__ == "__main__":
    main()
