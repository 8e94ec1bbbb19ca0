// Noise from a seed, as the service draws it: numpy's Generator over Philox 4x64-10 (Salmon et al. 2011), keyed by
// (seed, item), in float32.
import { exponential, normal } from "./ziggurat.js";

const BITS_64 = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;
const TINY = 1.1754943508222875e-38; // the smallest normal float32: log(0) is infinite
const { fround } = Math;

class Bits {
  constructor(seed, item) {
    this.key = [BigInt(seed), BigInt(item)];
    this.counter = 0n;
    this.left = []; // numbers of 32 bits, the next one last
  }

  uint32() {
    if (!this.left.length) {
      this.counter += 1n;
      for (const word of this.block().reverse()) this.left.push(Number(word >> 32n), Number(word & 0xffffffffn));
    }
    return this.left.pop();
  }

  // Four numbers of 64 bits.
  block() {
    let [a, b, c, d] = [this.counter & BITS_64, this.counter >> 64n, 0n, 0n];
    let [one, other] = this.key;
    for (let round = 0; round < ROUNDS; round++) {
      const low = MULTIPLIERS[0] * a;
      const high = MULTIPLIERS[1] * c;
      [a, b, c, d] = [(high >> 64n) ^ b ^ one, high & BITS_64, (low >> 64n) ^ d ^ other, low & BITS_64];
      one = (one + WEYL[0]) & BITS_64;
      other = (other + WEYL[1]) & BITS_64;
    }
    return [a, b, c, d];
  }

  // In [0, 1).
  uniform() {
    return fround((this.uint32() >>> 8) * 2 ** -24);
  }

  normal() {
    for (;;) {
      const number = this.uint32();
      const layer = number & 0xff;
      const negative = (number >>> 8) & 1;
      const place = (number >>> 9) & 0x7fffff;
      const x = fround(fround(place) * normal.width[layer]);
      if (place >= normal.inside[layer]) {
        if (layer === 0) return this.tail((place >>> 8) & 1);
        if (this.density(normal, layer) >= Math.exp(-0.5 * x * x)) continue;
      }
      return negative ? -x : x;
    }
  }

  tail(negative) {
    const edge = fround(normal.tail);
    for (;;) {
      const x = fround(fround(-1 / normal.tail) * this.logOfRest());
      const y = -this.logOfRest();
      if (fround(y + y) > fround(x * x)) return negative ? -fround(edge + x) : fround(edge + x);
    }
  }

  exponential() {
    for (;;) {
      const number = this.uint32() >>> 1;
      const layer = number & 0xff;
      const place = number >>> 8;
      const x = fround(fround(place) * exponential.width[layer]);
      if (place < exponential.inside[layer]) return x;
      if (layer === 0) return fround(fround(exponential.tail) - this.logOfRest());
      if (this.density(exponential, layer) < Math.exp(-x)) return x;
    }
  }

  // A density between those of the layer's edges.
  density(table, layer) {
    const below = table.density[layer];
    return fround(fround(fround(table.density[layer - 1] - below) * this.uniform()) + below);
  }

  logOfRest() {
    return fround(Math.log1p(-this.uniform()));
  }
}

const DRAW = {
  uniform: (bits) => bits.uniform(),
  normal: (bits) => bits.normal(),
  exponential: (bits) => Math.max(bits.exponential(), TINY),
  gumbel: (bits) => fround(-Math.log(Math.max(bits.exponential(), TINY))),
};

// The noise inputs of `size` items of a request, as { name: Float32Array of size * elements }.
export function draw(noises, seed, size) {
  const found = Object.fromEntries(noises.map(({ spec }) => [spec.name, new Float32Array(size * spec.elements)]));
  for (let item = 0; item < size; item++) {
    const bits = new Bits(seed, item);
    for (const { spec, distribution } of noises) {
      const array = found[spec.name];
      for (let i = 0; i < spec.elements; i++) array[item * spec.elements + i] = DRAW[distribution](bits);
    }
  }
  return found;
}
