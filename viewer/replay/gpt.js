// The GPT of model.py in plain JavaScript. It reads a page, and returns logits, value, predicted changes and attention.
//
// Only the last position is read, so the last block computes one query. With one layer that query is the same on every
// page, and keys and values depend only on a character and its position. Each such pair is computed once.
"use strict";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// Return the weights {name: Float32Array} of a stage, as weights.py has written them. shapes: {name: shape}.
function unpack({ weights, largest, letters }, shapes) {
  const digit = Object.fromEntries([...LETTERS].map((letter, i) => [letter.charCodeAt(0), i]));
  const half = 64 ** letters / 2;
  const unpacked = {};
  let at = 0; // the next letter
  let row = 0; // of all matrices together
  for (const [name, shape] of Object.entries(shapes)) {
    const length = shape.at(-1);
    const rows = shape.slice(0, -1).reduce((product, size) => product * size, 1);
    unpacked[name] = Float32Array.from({ length: rows * length }, (_, i) => {
      let number = 0;
      for (let k = 0; k < letters; k++) number = 64 * number + digit[weights.charCodeAt(at++)];
      return (number - half) * (largest[row + Math.floor(i / length)] / (half - 1));
    });
    row += rows;
  }
  return unpacked;
}

class GPT {
  // config is a GPTConfig of model.py, and weights are {name in model.py: Float32Array}.
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.pairs = new Map(); // {character * T + position: scores and value of the pair}, with one layer
    this.query = null; // of the last position; with one layer it is always the same
    this.block = `blocks.${config.n_layer - 1}.`; // the last one, which computes one query
    this.silent = new Set(); // the heads whose output is left out
  }

  // Read a page, an array of T indices in the config's characters. Returns {logits, probabilities, value, changes,
  // attention}: changes are the probabilities of rows and then of columns, and attention is [head][position].
  read(page) {
    const sums = this.sum(page);
    const { n_head, n_embd: C } = this.config;
    const attention = sums.weights.map((weights, h) => weights.map((weight) => weight / sums.weight[h]));
    const headOf = (c) => Math.floor((c * n_head) / C);
    const attended = sums.value.map((sum, c) => (this.silent.has(headOf(c)) ? 0 : sum / sums.weight[headOf(c)]));
    return { ...this.answer(sums.last, attended), attention };
  }

  // Do the work of `read` without the attention, for a page that differs in one position from the page of these sums.
  // This works for one layer only.
  readChanged(sums, t, character) {
    const { n_head, n_embd: C } = this.config;
    const D = C / n_head;
    const value = new Float64Array(C);
    const before = this.pair(sums.page[t], t);
    const now = this.pair(character, t);
    for (let h = 0; h < n_head; h++) {
      if (this.silent.has(h)) continue;
      const less = sums.weights[h][t];
      const more = Math.exp(now.scores[h] - sums.max[h]);
      // Too little would be left but rounding, or the new weight is too large.
      if (less > 0.999 * sums.weight[h] || more > 1e300) return this.read(sums.page.with(t, character));
      const weight = sums.weight[h] - less + more;
      for (let c = h * D; c < (h + 1) * D; c++) {
        value[c] = (sums.value[c] - less * before.value[c] + more * now.value[c]) / weight;
      }
    }
    return this.answer(sums.last, value);
  }

  // Return what a softmax divides: for each head the sum of its weights, and the sum of the weighted values.
  sum(page) {
    const { n_layer, n_head, n_embd: C } = this.config;
    const T = page.length;
    const D = C / n_head;
    let x = null;
    if (n_layer > 1) {
      x = this.hidden(page);
      this.query = this.queryOf(x[T - 1]);
    }
    const last = x ? x[T - 1] : this.embedding(page[T - 1], T - 1);
    this.query ??= this.queryOf(last);
    const tokens = Array.from(page, (character, t) => (x ? this.scoreAndValue(x[t]) : this.pair(character, t)));
    const sums = { page, last, max: [], weight: [], weights: [], value: new Float64Array(C) };
    for (let h = 0; h < n_head; h++) {
      let max = -Infinity;
      let sum = 0;
      for (const { scores } of tokens) if (scores[h] > max) max = scores[h];
      const weights = new Float64Array(T);
      for (let t = 0; t < T; t++) {
        const { scores, value } = tokens[t];
        const less = max - scores[h];
        if (less > 40) continue; // such a weight is lost in rounding, as most of a page is
        const weight = weights[t] = Math.exp(-less);
        sum += weight;
        for (let c = h * D; c < (h + 1) * D; c++) sums.value[c] += weight * value[c];
      }
      sums.max.push(max);
      sums.weight.push(sum);
      sums.weights.push(weights);
    }
    return sums;
  }

  // Compute the rest of the last block and the outputs, from the last position's input and its heads' attention.
  answer(last, attended) {
    const out = this.mlp(add(last, this.linear(this.block + "attn.c_proj", attended)), this.block);
    return this.heads(layerNorm(out, this.weights["ln_f.weight"]));
  }

  heads(features) {
    const logits = this.linear("policy_head", features);
    const most = Math.max(...logits);
    const powers = Array.from(logits, (logit) => Math.exp(logit - most));
    const total = powers.reduce((a, b) => a + b);
    return {
      logits,
      probabilities: powers.map((power) => power / total),
      value: this.linear("value_head", features)[0],
      changes: this.linear("change_head", features).map((logit) => 1 / (1 + Math.exp(-logit))),
    };
  }

  embedding(character, t) {
    const { columns, n_embd: C } = this.config;
    const x = new Float64Array(C);
    const places = [["wte", character], ["wre", Math.floor(t / columns)], ["wce", t % columns]];
    for (const [name, i] of places) for (let c = 0; c < C; c++) x[c] += this.weights[name + ".weight"][i * C + c];
    return x;
  }

  // Return the query of the last position times the weights of the keys, (heads, C), scaled. A score is then the
  // product of a row with a normalised input, so that no key is computed.
  queryOf(last) {
    const { n_head, n_embd: C } = this.config;
    const D = C / n_head;
    const W = this.weights[this.block + "attn.c_attn.weight"];
    const q = matrixTimes(W.subarray(0, C * C), layerNorm(last, this.weights[this.block + "ln_1.weight"]));
    const folded = [];
    for (let h = 0; h < n_head; h++) {
      const row = new Float64Array(C);
      for (let d = h * D; d < (h + 1) * D; d++) {
        for (let c = 0; c < C; c++) row[c] += (q[d] * W[(C + d) * C + c]) / Math.sqrt(D);
      }
      folded.push(row);
    }
    return folded;
  }

  scoreAndValue(x) {
    const { n_embd: C } = this.config;
    const normal = layerNorm(x, this.weights[this.block + "ln_1.weight"]);
    const scores = this.query.map((row) => dot(row, normal));
    return { scores, value: matrixTimes(this.weights[this.block + "attn.c_attn.weight"].subarray(2 * C * C), normal) };
  }

  pair(character, t) {
    const place = character * this.config.rows * this.config.columns + t;
    let pair = this.pairs.get(place);
    if (!pair) this.pairs.set(place, (pair = this.scoreAndValue(this.embedding(character, t))));
    return pair;
  }

  // Return every position after all blocks except the last. This is slow, and needed only with more than one layer.
  hidden(page) {
    const { n_layer, n_head, n_embd: C } = this.config;
    const D = C / n_head;
    let x = Array.from(page, (character, t) => this.embedding(character, t));
    for (let layer = 0; layer < n_layer - 1; layer++) {
      const block = `blocks.${layer}.`;
      const normal = x.map((row) => layerNorm(row, this.weights[block + "ln_1.weight"]));
      const qkv = normal.map((row) => matrixTimes(this.weights[block + "attn.c_attn.weight"], row));
      x = x.map((row, t) => {
        const y = new Float64Array(C);
        for (let h = 0; h < n_head; h++) {
          const scores = new Float64Array(t + 1);
          let max = -Infinity;
          let sum = 0;
          for (let s = 0; s <= t; s++) {
            let score = 0;
            for (let d = h * D; d < (h + 1) * D; d++) score += qkv[t][d] * qkv[s][C + d];
            scores[s] = score / Math.sqrt(D);
            if (scores[s] > max) max = scores[s];
          }
          for (let s = 0; s <= t; s++) {
            const less = max - scores[s];
            if (less > 40) continue; // as in `sum`
            const weight = Math.exp(-less);
            sum += weight;
            for (let d = h * D; d < (h + 1) * D; d++) y[d] += weight * qkv[s][2 * C + d];
          }
          for (let d = h * D; d < (h + 1) * D; d++) y[d] /= sum;
        }
        return this.mlp(add(row, this.linear(block + "attn.c_proj", y)), block);
      });
    }
    return x;
  }

  mlp(x, block) {
    const inner = this.linear(block + "mlp.c_fc", layerNorm(x, this.weights[block + "ln_2.weight"]));
    return add(x, this.linear(block + "mlp.c_proj", inner.map(gelu)));
  }

  linear(name, x) {
    const y = matrixTimes(this.weights[name + ".weight"], x);
    const bias = this.weights[name + ".bias"];
    return bias ? add(y, bias) : y;
  }
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += a[i] * b[i];
  return sum;
}

// Multiply a matrix, given as its rows one after the other, by a vector.
function matrixTimes(matrix, x) {
  const y = new Float64Array(matrix.length / x.length);
  for (let i = 0; i < y.length; i++) {
    let sum = 0;
    for (let j = 0, at = i * x.length; j < x.length; j++) sum += matrix[at + j] * x[j];
    y[i] = sum;
  }
  return y;
}

const add = (a, b) => Float64Array.from(a, (x, i) => x + b[i]);

function layerNorm(x, weight) {
  let mean = 0;
  let variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  return Float64Array.from(x, (value, i) => (value - mean) * scale * weight[i]);
}

const gelu = (x) => 0.5 * x * (1 + erf(x / Math.SQRT2));

// The error function, to within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const tail = polynomial * Math.exp(-x * x);
  return x < 0 ? tail - 1 : 1 - tail;
}
