// Tags a text with a host's and a reader's ONNX file, in a browser.
//
// A text is read whole, so it has to fit into the host's window. Each word has its best tag: the rules of the tag
// scheme, by which unihyperlora decodes, are left out here.

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1; // several need a page that is isolated from other origins
ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI).href;

// What of an ONNX file holds its metadata; onnxruntime-web does not hand them out.
const Model = protobuf
  .parse(
    `syntax = "proto3";
     message Entry { string key = 1; string value = 2; }
     message Model { repeated Entry metadata_props = 14; }`,
    { keepCase: true },
  )
  .root.lookupType("Model");

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be loaded: HTTP ${answer.status}.`);
  return answer;
}

async function opened(url, kind) {
  const bytes = new Uint8Array(await (await fetched(url)).arrayBuffer());
  const entry = Model.decode(bytes).metadata_props.find(({ key }) => key === "unihyperlora");
  const said = entry ? JSON.parse(entry.value) : {};
  if (said.kind !== kind || said.format !== "1") throw new Error(`${url} is no ${kind}'s file of format 1.`);
  return [await ort.InferenceSession.create(bytes), said];
}

export class Tagger {
  static async load(hostUrl, tokenizerUrl, readerUrl) {
    const tagger = new Tagger();
    [tagger.hostSession, tagger.host] = await opened(hostUrl, "host");
    [tagger.readerSession, tagger.reader] = await opened(readerUrl, "reader");
    const { host, reader } = tagger;
    if (host.space !== reader.space) throw new Error("The reader reads another space than the host's file gives.");
    if (reader.map !== null && reader.map !== host.map) throw new Error("The reader was tuned on another host.");
    if (reader.type !== "token_classification") throw new Error("The reader does not tag words.");
    tagger.tokenizer = new Tokenizer(await (await fetched(tokenizerUrl)).json(), {});
    return tagger;
  }

  /** Where the words of a text are: [start, end] each. */
  words(text) {
    const places = [];
    for (const { 0: run, index } of text.matchAll(/\S+/g)) {
      let at = index;
      for (const word of run.split(new RegExp(this.host.cut, "u"))) places.push([at, (at += word.length)]);
    }
    return places;
  }

  encode(text) {
    return this.tokenizer.encode(text).ids;
  }

  /** The scores of each word, one array a word. */
  async scores(text) {
    const ids = BigInt64Array.from(this.encode(text), BigInt);
    const given = {
      input_ids: new ort.Tensor("int64", ids, [1, ids.length]),
      attention_mask: new ort.Tensor("int64", ids.map(() => 1n), [1, ids.length]),
    };
    const states = await this.hostSession.run(given);
    const asked = Object.fromEntries(this.readerSession.inputNames.map((name) => [name, states[name]]));
    const { logits } = await this.readerSession.run(asked);
    const labels = this.reader.labels.length;
    const first = [...states.begins.data.keys()].filter((token) => states.begins.data[token]);
    return first.map((token) => logits.data.slice(token * labels, (token + 1) * labels));
  }

  /** The entities of a text: {type, start, end} each. */
  async tag(text) {
    const places = this.words(text);
    if (!places.length) return [];
    const tags = (await this.scores(text)).map((row) => this.reader.labels[row.indexOf(Math.max(...row))]);
    const entities = [];
    let before = ["O"];
    for (const [word, tag] of tags.entries()) {
      const [role, type] = tag.split(/-(.*)/s);
      if (role === "I" && before[0] !== "O" && before[1] === type) entities.at(-1).end = places[word][1];
      else if (role !== "O") entities.push({ type, start: places[word][0], end: places[word][1] });
      before = [role, type];
    }
    return entities;
  }
}
