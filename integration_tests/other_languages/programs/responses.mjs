// Two agents. One asks over Responses, as streams with tools, and goes on from the answer before; the other judges with
// two choices of a chat answer, at an address that only its key tells from the first one's. The reward is posted.

import assert from "node:assert";
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const task = JSON.parse(await readFile(process.env.LEYDEN_TASK_FILE, "utf8"));
const tools = [
  { type: "function", name: "columns", strict: false, parameters: { type: "object", properties: { table: {} } } },
];

const main = new OpenAI();
let input = [{ role: "user", content: task.question }];
let response;
do {
  const instructions = "[[role=main]]";
  const previous_response_id = response?.id;
  const stream = main.responses.stream({ model: "any", instructions, input, tools, previous_response_id });
  let heard = "";
  stream.on("response.output_text.delta", (event) => (heard += event.delta));
  response = await stream.finalResponse();
  assert.equal(heard, response.output_text);
  const calls = response.output.filter((item) => item.type === "function_call");
  input = calls.map((call) => {
    const { table } = JSON.parse(call.arguments);
    const output = task.schema.split("\n").find((line) => line.startsWith(`${table}(`)) ?? "no such table";
    return { type: "function_call_output", call_id: call.call_id, output };
  });
} while (input.length);
const kept = await main.responses.retrieve(response.id);
assert.equal(kept.output[0].content[0].text, response.output_text);

const origin = new URL(process.env.LEYDEN_BASE_URL_CRITIC).origin;
const critic = new OpenAI({ baseURL: `${origin}/v1`, apiKey: process.env.LEYDEN_API_KEY_CRITIC });
const verdict = await critic.chat.completions.create({
  model: "any",
  n: 2,
  messages: [
    { role: "system", content: "[[role=critic]]" },
    { role: "user", content: `${task.question}\n${response.output_text}` },
  ],
});

const posted = await fetch(process.env.LEYDEN_REWARD_URL, {
  method: "POST",
  body: JSON.stringify({
    reward: Number(response.output_text === task.expected),
    agreed: verdict.choices.filter((choice) => choice.message.content === "yes").length,
  }),
});
assert.equal(posted.status, 200);
