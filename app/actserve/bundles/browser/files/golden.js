// Verifies the golden samples of a bundle: inputs with the trained policy's own outputs.
const READERS = {
  U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, I32: Int32Array, I64: BigInt64Array,
  F16: Uint16Array, F32: Float32Array, F64: Float64Array, BOOL: Uint8Array,
};
const EPSILONS = { float16: 2 ** -10, bfloat16: 2 ** -7 };
const [INPUT, OUTPUT] = ["input.", "output."];

// What is wrong: a line for each output that differs, one by one or in batches.
export async function verify(policy, { inputs, outputs, samples }) {
  const wrong = [];
  for (const size of new Set([1, Math.min(8, policy.maxBatch)])) {
    const differing = new Map(policy.results.map((spec) => [spec, 0]));
    for (let start = 0; start < samples; start += size) {
      const end = Math.min(start + size, samples);
      const found = await policy.run(slices(policy.inputs, inputs, start, end), end - start);
      const expected = slices(policy.results, outputs, start, end);
      for (const spec of policy.results) {
        const count = differing.get(spec) + differ(policy, spec, found[spec.name], expected[spec.name]);
        differing.set(spec, count);
      }
    }
    for (const [spec, count] of differing) {
      if (count > allowed(policy, spec, samples)) {
        wrong.push(`${spec.name} differs from the golden samples in batches of ${size}: ${count} elements`);
      }
    }
  }
  return wrong;
}

// { inputs, outputs, samples: how many }, from the file of the bundle.
export async function goldenSamples(policy) {
  const tensors = readSafetensors(await policy.read("golden.safetensors"));
  const named = (prefix) => Object.fromEntries(
    Object.entries(tensors).filter(([name]) => name.startsWith(prefix))
      .map(([name, array]) => [name.slice(prefix.length), array]),
  );
  const [inputs, outputs] = [named(INPUT), named(OUTPUT)];
  for (const spec of policy.inputs) inputs[spec.name] = asHalf(spec, inputs[spec.name]);
  const { name, elements } = policy.observations[0];
  return { inputs, outputs, samples: inputs[name].length / elements };
}

export function slices(specs, arrays, start, end) {
  return Object.fromEntries(
    specs.map(({ name, elements }) => [name, arrays[name].subarray(start * elements, end * elements)]),
  );
}

// How many elements differ.
function differ(policy, spec, ours, theirs) {
  const { absolute, relative } = policy.manifest.certificate.tolerance;
  if (!spec.dtype.includes("float")) return ours.reduce((count, value, i) => count + (value !== theirs[i]), 0);
  const rounding = 2 * (EPSILONS[spec.dtype] ?? 0);
  const [least, share] = [Math.max(absolute, rounding), Math.max(relative, rounding)];
  const [found, expected] = [floats(spec, ours), floats(spec, theirs)];
  let count = 0;
  for (let i = 0; i < found.length; i++) {
    const [a, b] = [found[i], expected[i]];
    const same = a === b || Math.abs(a - b) <= least + share * Math.abs(b);
    count += !same;
  }
  return count;
}

// Rounding decides at a limit: a few items may be limited in one program and not in the other.
function allowed(policy, spec, samples) {
  const isLimited = spec.name === "limited" && policy.manifest.signature.limits;
  return isLimited ? Math.max(1, Math.floor(samples / 50)) : 0;
}

function asHalf(spec, array) {
  return spec.dtype === "float16" ? new spec.Array(array.buffer, array.byteOffset, array.length) : array;
}

// The numbers of an array; of float16 where the browser has no arrays of them, too.
function floats(spec, array) {
  if (spec.dtype !== "float16" || !(array instanceof Uint16Array)) return array;
  return Float32Array.from(array, (half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}

// The tensors of a file: the length of the header in eight bytes, the header in JSON, then the data.
function readSafetensors(data) {
  const length = Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(data.subarray(8, 8 + length)));
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, data_offsets: [first, last] }]) => {
      const bytes = data.slice(8 + length + first, 8 + length + last); // a copy is aligned
      return [name, new READERS[dtype](bytes.buffer)];
    }),
  );
}
