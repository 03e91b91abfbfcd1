// An agent that gets one answer, and then ends as its task says; in a group, its second sample does.

import OpenAI from "openai";

const task = JSON.parse(process.env.LEYDEN_TASK);
const client = new OpenAI({ maxRetries: 0 });
const ask = (text) => ({ model: "any", messages: [{ role: "user", content: `${text} ${task.question}` }] });

await client.chat.completions.create(ask("first"));
const isFirstSample = process.env.LEYDEN_ROLLOUT_ID.endsWith("-0");
switch (isFirstSample ? "succeed" : task.how) {
  case "exit":
    console.error("no such table: user");
    process.exit(3);
  case "hang":
    for await (const chunk of await client.chat.completions.create({ ...ask("second"), stream: true })) void chunk;
    break;
  case "post": {
    const answer = await fetch(process.env.LEYDEN_REWARD_URL, { method: "POST", body: '"high"' });
    console.log(answer.status, await answer.text());
    break;
  }
  case "print":
    console.log("high");
    break;
  default:
    console.log(1);
}
