// Paints with the `openai` package for Node.js: one picture, then a stream with previews.
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const gateway = process.env.TWINBRUSH_GATEWAY ?? "http://127.0.0.1:8080";
const client = new OpenAI({ baseURL: `${gateway}/v1`, apiKey: process.env.TWINBRUSH_KEY ?? "none" });

const prompt = "a small green star on black";
const answer = await client.images.generate({ prompt, seed: 7 });
await writeFile("star.png", Buffer.from(answer.data[0].b64_json, "base64"));

const events = await client.images.generate({ prompt, stream: true, partial_images: 2, steps: 12 });
for await (const event of events) {
  console.log(event.type, event.b64_json.length);
}
