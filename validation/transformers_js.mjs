// node transformers_js.mjs FOLDER LIBRARY PROMPTS: one JSON object, way of loading -> tokens behind each prompt, or why not.
// PROMPTS is JSON, a list of lists of token ids. Nothing is fetched.
import path from "node:path";

const [folder, library, prompts] = process.argv.slice(2);
const T = await import(library);
T.env.allowRemoteModels = false;
T.env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const TOKENS = 12;

async function continued(model) {
  const found = [];
  for (const ids of JSON.parse(prompts)) {
    const input_ids = new T.Tensor("int64", ids.map(BigInt), [1, ids.length]);
    const attention_mask = T.ones([1, ids.length]);
    const all = await model.generate({ input_ids, attention_mask, max_new_tokens: TOKENS, do_sample: false });
    found.push(all.tolist()[0].slice(ids.length).map(Number));
  }
  return found;
}

const ways = {
  AutoModelForCausalLM: async () => continued(await T.AutoModelForCausalLM.from_pretrained(name)),
  Gemma4ForCausalLM: async () => continued(await T.Gemma4ForCausalLM.from_pretrained(name)),
  pipeline: async () => continued((await T.pipeline("text-generation", name)).model),
};
const found = {};
for (const [way, run] of Object.entries(ways)) {
  try {
    found[way] = await run();
  } catch (error) {
    found[way] = String(error).split("\n")[0];
  }
}
console.log(JSON.stringify(found));
