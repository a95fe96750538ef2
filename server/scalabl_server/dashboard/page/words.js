// Formats numbers and results as text.

const WHOLE = new Intl.NumberFormat("en");
const TIME = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });

export const DOUBTS = { entropy: "Entropy", mutual_information: "Mutual information", confidence: "1 − confidence" };

export function count(value) {
  return WHOLE.format(value);
}

/** "1 label", "2 labels". */
export function many(value, thing) {
  return `${count(value)} ${thing}${value === 1 ? "" : "s"}`;
}

/** A share in percent. A share that is not exactly 0 or 1 is never rounded to 0% or 100%. */
export function percent(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const least = 10 ** -(digits + 2);
  if (value > 0 && value < least) return `<${(100 * least).toFixed(digits)}%`;
  if (value < 1 && value > 1 - least) return `>${(100 * (1 - least)).toFixed(digits)}%`;
  return `${(100 * value).toFixed(digits)}%`;
}

export function nats(value) {
  if (value < 0.0001) return value > 0 ? "<0.0001" : "0";
  return value < 0.001 ? value.toFixed(4) : value.toPrecision(3);
}

export function time(text) {
  return TIME.format(new Date(text));
}

/** A range of times; parts that both have in common appear once. */
export function times(from, to) {
  return TIME.formatRange(new Date(from), new Date(to));
}

/** "80.0% (54.8 to 93.0)". */
export function withInterval(share) {
  if (share.share === null) return "–";
  return `${percent(share.share)} (${(100 * share.low).toFixed(1)} to ${(100 * share.high).toFixed(1)})`;
}

/** A sentence about the entropy and its two parts of an answer over `count` choices. */
export function aboutDoubt(answer, count) {
  const most = Math.log(count);
  if (answer.entropy < 0.02 * most) return "The model is almost certain.";
  const own = answer.mutual_information / answer.entropy;
  if (own > 0.5) {
    return "Most of the uncertainty comes from the model: its posterior samples disagree. This is typical of inputs unlike the training data.";
  }
  if (own > 0.2) {
    return "Part of the uncertainty comes from the model, whose posterior samples disagree. The rest comes from an ambiguous input.";
  }
  return "Most of the uncertainty comes from an ambiguous input: each posterior sample is uncertain.";
}

/** A sentence that compares a mutual information with those of the calibration set; null without a calibration. */
export function rankOf(value, quantiles) {
  const known = Object.entries(quantiles ?? {}).sort(([a], [b]) => Number(a) - Number(b));
  if (known.length === 0) return null;
  const below = known.filter(([, quantile]) => quantile < value);
  if (below.length === 0) {
    return `Its mutual information is among the lowest ${percent(Number(known[0][0]), 0)} of the calibration set’s.`;
  }
  return `Its mutual information is higher than ${percent(Number(below.at(-1)[0]), 0)} of the calibration set’s.`;
}
