// A text-to-SQL agent with a tool, on OpenAI's own client. It knows nothing of Leyden.
//
// It reads its task from LEYDEN_TASK, finds its model where OPENAI_BASE_URL and OPENAI_API_KEY point, streams every
// answer, and prints its reward last.

import OpenAI from "openai";

const MOST_TURNS = 4;

const tools = [
  {
    type: "function",
    function: {
      name: "columns",
      description: "Return the columns of a table.",
      parameters: { type: "object", properties: { table: { type: "string" } }, required: ["table"] },
    },
  },
];

/** Return what the tool answers; a model's mistake is told to the model. */
function columns(schema, args) {
  try {
    const { table } = JSON.parse(args);
    return schema.split("\n").find((line) => line.startsWith(`${table}(`)) ?? `there is no table ${table}`;
  } catch (error) {
    return `these arguments are no JSON: ${error.message}`;
  }
}

/** Return the last answer: a query, unless the model only ever called tools. */
async function solve(task) {
  const client = new OpenAI();
  const messages = [
    { role: "system", content: `writer\n${task.schema}` },
    { role: "user", content: task.question },
  ];
  for (let turn = 0; turn < MOST_TURNS; turn++) {
    const stream = client.chat.completions.stream({ model: "any", messages, tools, max_tokens: 48 });
    stream.on("content", (piece) => process.stderr.write(piece));
    const { message } = (await stream.finalChatCompletion()).choices[0];
    messages.push(message);
    if (!message.tool_calls?.length) return message.content;
    for (const call of message.tool_calls) {
      const content = columns(task.schema, call.function.arguments);
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
  return "";
}

/** Score a query: 1 when it is the expected one, else a half at most, by the words that the two share (F1). */
function score(query, expected) {
  const [said, wanted] = [query, expected].map((text) => (text ?? "").trim().toLowerCase().split(/\s+/));
  if (said.join(" ") === wanted.join(" ")) return 1;
  const left = [...wanted];
  const shared = said.filter((word) => left.includes(word) && left.splice(left.indexOf(word), 1)).length;
  return shared / (said.length + wanted.length);
}

const task = JSON.parse(process.env.LEYDEN_TASK);
console.log(score(await solve(task), task.expected));
