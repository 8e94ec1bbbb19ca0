// A trained policy in the browser: an ES module over onnxruntime-web.
//
//   import { Policy } from "./policy.js";
//   const policy = await Policy.load();
//   const episode = policy.episode({ seed: 1 });   // keeps the state of a recurrent policy
//   const action = await episode.act(observation); // a typed array of one observation, row-major
//
// Seeds give the actions that the service of actserve gives for them. Errors are of the class BadInput where the input
// is wrong: they say what was expected and what came.
import { draw } from "./noise.js";
import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { hex, sha256, stepSeed } from "./sha256.js";

const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array, int32: Int32Array,
  int64: BigInt64Array, float16: globalThis.Float16Array ?? Uint16Array, bfloat16: Float32Array,
  float32: Float32Array, float64: Float64Array, bool: Uint8Array,
};
const IS_INIT = { name: "is_init", dtype: "bool", shape: [] };
const MAX_SEED = 2n ** 63n - 1n;

export class BadInput extends Error {}

// One named tensor. `shape` is of one item: the batch axis is no part of it.
class Tensor {
  constructor({ name, dtype, shape, low = null, high = null }) {
    Object.assign(this, { name, dtype, shape, low, high });
    this.elements = shape.reduce((product, size) => product * size, 1);
    this.Array = ARRAYS[dtype];
  }

  toString() {
    return `${this.dtype}[${this.shape.join(", ")}]`;
  }

  // `values` as a typed array of whole items. Plain arrays and numbers are converted.
  check(values) {
    const array = this.convert(values);
    if (!(array instanceof this.Array) || !array.length || array.length % this.elements) {
      const got = array?.constructor?.name ?? typeof array;
      const expected = `${this.Array.name} of a multiple of ${this.elements}`;
      throw new BadInput(`${this.name}: expected a ${expected}, ${this}; got ${got} of ${array?.length}`);
    }
    if (this.dtype.includes("float") && array.some((value) => Number.isNaN(value))) {
      throw new BadInput(`${this.name}: expected numbers; got NaN`);
    }
    this.checkBound(array, this.low, (value, bound) => value < bound, "at least");
    this.checkBound(array, this.high, (value, bound) => value > bound, "at most");
    return array;
  }

  convert(values) {
    const list = typeof values === "number" || typeof values === "boolean" ? [values] : values;
    if (!Array.isArray(list)) return list;
    const flat = list.flat(Infinity);
    return this.Array === BigInt64Array ? BigInt64Array.from(flat, BigInt) : this.Array.from(flat, Number);
  }

  checkBound(array, bound, isOutside, relation) {
    if (bound === null) return;
    const at = array.findIndex((value, i) => {
      const each = Array.isArray(bound) ? bound[i % this.elements] : bound;
      return each !== null && isOutside(value, each);
    });
    if (at >= 0) throw new BadInput(`${this.name}: expected values of ${relation} ${bound}; got ${array[at]}`);
  }

  // `size` items of one value, or of the values of one item.
  filled(size, value) {
    const one = Array.isArray(value) ? value : Array(this.elements).fill(value);
    const items = this.convert(one);
    const array = new this.Array(size * this.elements);
    for (let item = 0; item < size; item++) array.set(items, item * this.elements);
    return array;
  }

  // As onnxruntime-web takes it.
  fed(array, size) {
    const type = this.dtype === "bfloat16" ? "float32" : this.dtype;
    return new ort.Tensor(type, array, [size, ...this.shape]);
  }
}

export class Policy {
  // Opens the bundle in `folder`, a URL; by default the one of this module. More threads than one need a page that is
  // cross-origin isolated. Throws if a file is not the one that the manifest names.
  static async load({ folder = new URL(".", import.meta.url), threads = 1 } = {}) {
    const manifest = await (await fetched(new URL("manifest.json", folder))).json();
    const policy = new Policy(new URL(folder, location.href), manifest);
    ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    const program = await policy.read(manifest.programs.onnx.file);
    const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
    policy.session = await ort.InferenceSession.create(program, options);
    return policy;
  }

  constructor(folder, manifest) {
    const { signature } = manifest;
    this.folder = folder;
    this.manifest = manifest;
    this.label = `${manifest.name}@${manifest.version}`;
    this.observations = signature.observations.map((spec) => new Tensor(spec));
    this.outputs = signature.outputs.map((spec) => new Tensor(spec));
    this.action = this.outputs[0];
    this.state = signature.state.map(({ spec, output, initial }) => ({ spec: new Tensor(spec), output, initial }));
    this.noise = signature.noise.map(({ spec, ...rest }) => ({ spec: new Tensor(spec), ...rest }));
    this.parameters = signature.parameters.map((one) => ({
      default: one.default,
      spec: new Tensor({ ...one, dtype: "float32", shape: [] }),
    }));
    this.modes = signature.exploration;
    this.isInit = signature.is_init ? new Tensor(IS_INIT) : null;
    this.explore = this.modes.length > 1 ? new Tensor({ name: "explore", dtype: "bool", shape: [] }) : null;
    this.maxBatch = signature.max_batch;
    this.results = [...this.outputs, ...this.state.map(({ spec, output }) => new Tensor({ ...spec, name: output }))];
    const states = this.state.map(({ spec }) => spec);
    const parameters = this.parameters.map(({ spec }) => spec);
    this.requestInputs = [...this.observations, ...states, ...(this.isInit ? [this.isInit] : []), ...parameters];
    const noise = this.noise.map(({ spec }) => spec);
    this.inputs = [...this.requestInputs, ...(this.explore ? [this.explore] : []), ...noise];
  }

  // A file of the bundle, as a Uint8Array.
  async read(file) {
    const data = new Uint8Array(await (await fetched(new URL(file, this.folder))).arrayBuffer());
    if (hex(sha256(data)) !== this.manifest.files[file].sha256) {
      throw new Error(`${file} has changed: its SHA-256 is not the one in manifest.json`);
    }
    return data;
  }

  // Calls the program with typed arrays of all its inputs -> { name: typed array } of outputs and new state.
  async run(arrays, size) {
    const feeds = Object.fromEntries(this.inputs.map((spec) => [spec.name, spec.fed(arrays[spec.name], size)]));
    const found = await this.session.run(feeds);
    const names = this.session.outputNames;
    return Object.fromEntries(this.results.map(({ name }, i) => [name, found[names[i]].data]));
  }

  // Acts on a batch: { name: typed array of k items } -> outputs, and new state under the name of the input that it
  // replaces. Without state, an episode begins. `exploration` is "deterministic" or "random".
  async act(tensors, { exploration, seed } = {}) {
    const { arrays, size } = this.complete(tensors, exploration, seed);
    const found = await this.run(arrays, size);
    const outputs = this.outputs.map(({ name }) => [name, found[name]]);
    return Object.fromEntries([...outputs, ...this.state.map(({ spec, output }) => [spec.name, found[output]])]);
  }

  episode(options = {}) {
    return new Episode(this, options);
  }

  // Every input of the program.
  complete(tensors, exploration = this.modes[0], seed = randomSeed()) {
    const known = Object.fromEntries(this.requestInputs.map((spec) => [spec.name, spec]));
    for (const name of Object.keys(tensors)) {
      if (!known[name]) throw new BadInput(`expected inputs of ${Object.keys(known).join(", ")}; got ${name}`);
    }
    if (!this.modes.includes(exploration)) {
      throw new BadInput(`expected an exploration of ${this.modes.join(" or ")}; got ${exploration}`);
    }
    const begins = !this.state.some(({ spec }) => spec.name in tensors);
    const needed = [...this.observations, ...(begins ? [] : this.state.map(({ spec }) => spec))];
    const missing = needed.find(({ name }) => !(name in tensors));
    if (missing) throw new BadInput(`expected ${missing.name}, ${missing}; got nothing`);
    const arrays = {};
    const sizes = new Set();
    for (const [name, values] of Object.entries(tensors)) {
      arrays[name] = known[name].check(values);
      sizes.add(arrays[name].length / known[name].elements);
    }
    const [size] = sizes;
    if (sizes.size > 1 || size > this.maxBatch) {
      const expected = `the same number of items in every input, at most ${this.maxBatch}`;
      throw new BadInput(`expected ${expected}; got ${[...sizes].join(", ")}`);
    }
    for (const { spec, initial } of this.state) arrays[spec.name] ??= spec.filled(size, initial);
    if (this.isInit) arrays.is_init ??= this.isInit.filled(size, begins);
    for (const parameter of this.parameters) {
      arrays[parameter.spec.name] ??= parameter.spec.filled(size, parameter.default);
    }
    if (this.explore) arrays.explore = this.explore.filled(size, exploration === "random");
    return { arrays: { ...arrays, ...this.drawn(exploration, seed, size) }, size };
  }

  drawn(exploration, seed, size) {
    if (this.noise.some(({ always }) => always || exploration === "random")) {
      if (BigInt(seed) < 0n || BigInt(seed) > MAX_SEED) {
        throw new BadInput(`expected a seed of 0 to 2**63 - 1; got ${seed}`);
      }
      return draw(this.noise, seed, size);
    }
    return Object.fromEntries(this.noise.map(({ spec }) => [spec.name, spec.filled(size, 0)]));
  }
}

// One run of an environment: keeps the state, and derives the seed of each step from the episode's.
class Episode {
  constructor(policy, { exploration, seed = randomSeed() }) {
    Object.assign(this, { policy, exploration, seed });
    this.reset();
  }

  reset() {
    this.state = {};
    this.steps = 0;
  }

  // The action for one observation; several observations in the order of the signature. A number if it is one.
  async act(...observations) {
    const { name } = this.policy.action;
    return (await this.step(observations))[name];
  }

  // All outputs of one step: numbers, and typed arrays for outputs with a shape.
  async step(observations, parameters = {}) {
    const { policy } = this;
    if (observations.length !== policy.observations.length) {
      const names = policy.observations.map((spec) => `${spec.name} ${spec}`).join(", ");
      throw new BadInput(`expected ${names}; got ${observations.length} arrays`);
    }
    const tensors = { ...parameters };
    policy.observations.forEach((spec, i) => {
      tensors[spec.name] = spec.check(observations[i]);
      if (tensors[spec.name].length !== spec.elements) {
        throw new BadInput(`${spec.name}: expected one item, ${spec}; got ${tensors[spec.name].length} elements`);
      }
    });
    const seed = stepSeed(this.seed, this.steps + 1);
    const found = await policy.act({ ...tensors, ...this.state }, { exploration: this.exploration, seed });
    this.state = Object.fromEntries(policy.state.map(({ spec }) => [spec.name, found[spec.name]]));
    this.steps += 1;
    return Object.fromEntries(
      policy.outputs.map(({ name, shape }) => [name, shape.length ? found[name] : Number(found[name][0])]),
    );
  }
}

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`expected ${url.pathname}; the server answered with status ${answer.status}`);
  return answer;
}

function randomSeed() {
  return crypto.getRandomValues(new BigUint64Array(1))[0] & MAX_SEED;
}
