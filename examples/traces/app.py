"""An AutoGen app, traced by OpenInference: a writer turns a question into SQL, a checker looks at it.

It knows nothing of Leyden and needs none: it has traces of its own, as many apps have, sent wherever
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says. Its models are whatever OPENAI_BASE_URL points at; the writer's alone may be
elsewhere (WRITER_BASE_URL).

    pip install autogen-agentchat 'autogen-ext[openai]' opentelemetry-sdk opentelemetry-exporter-otlp-proto-http \\
        openinference-instrumentation-autogen-agentchat openinference-instrumentation-openai
    python -m examples.traces.app train --first 0 --count 300 --feedback thumbs.csv
    python -m examples.traces.app tuning --count 200
"""

import argparse
import asyncio
import csv
import os

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from openinference.instrumentation.autogen_agentchat import AutogenAgentChatInstrumentor
from openinference.instrumentation.openai import OpenAIInstrumentor
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from examples.text_to_sql import questions
from examples.text_to_sql.databases import path, schema
from examples.text_to_sql.reward import is_correct

AT_ONCE = 8
MAX_TOKENS = 48
ABILITIES = {
    "vision": False,
    "function_calling": False,
    "json_output": False,
    "structured_output": False,
    "family": "unknown",
}


def model(base_url: str) -> OpenAIChatCompletionClient:
    """Return the client of one agent."""
    return OpenAIChatCompletionClient(
        model="sql",
        base_url=base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "any"),
        temperature=0,
        max_tokens=MAX_TOKENS,
        model_info=ABILITIES,
        include_name_in_message=False,
    )


async def solve(question: questions.Question, writer_model: OpenAIChatCompletionClient) -> str:
    """Answer one question; this is the app."""
    tables = schema(str(path(question.database)))
    writer = AssistantAgent("writer", model_client=writer_model, system_message=f"writer\n{tables}")
    checker_model = model(os.environ["OPENAI_BASE_URL"])
    checker = AssistantAgent("checker", model_client=checker_model, system_message=f"checker\n{tables}")
    result = await RoundRobinGroupChat([writer, checker], max_turns=2).run(task=question.text)
    return next(str(one.content) for one in result.messages if one.source == "writer")


async def serve(asked: list[questions.Question]) -> list[tuple[str, float]]:
    """Answer questions, some at a time; return the trace of each, and whether it was answered right."""
    tracer = trace.get_tracer("text-to-sql")
    room = asyncio.Semaphore(AT_ONCE)
    writer_model = model(os.environ.get("WRITER_BASE_URL") or os.environ["OPENAI_BASE_URL"])

    async def one(question: questions.Question) -> tuple[str, float]:
        async with room:
            with tracer.start_as_current_span("solve") as span:
                span.set_attributes({"openinference.span.kind": "CHAIN", "input.value": question.text})
                sql = await solve(question, writer_model)
                span.set_attribute("output.value", sql)
            trace_id = trace.format_trace_id(span.get_span_context().trace_id)
            return trace_id, float(is_correct(question.database, sql, question.sql))

    return await asyncio.gather(*map(one, asked))


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bucket", choices=["train", "tuning"], help="questions to be asked; tuning ones are held out")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--feedback", help="CSV file to write: what customers thought of each answer")
    options = parser.parse_args()
    provider = TracerProvider()
    if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    OpenAIInstrumentor().instrument()
    AutogenAgentChatInstrumentor().instrument()
    asked = questions.load(options.bucket, count=options.first + options.count)[options.first :]
    told = asyncio.run(serve(asked))
    provider.shutdown()
    if options.feedback:
        with open(options.feedback, "w", newline="") as file:
            csv.writer(file).writerows([("rollout_id", "value"), *told])
    print(f"served right: {sum(value for _, value in told) / len(told):.3f} of {len(told)}")


if __name__ == "__main__":
    main()
