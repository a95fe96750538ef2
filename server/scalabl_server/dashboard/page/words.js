// Numbers and findings as text.

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

/** A share, never rounded to a certainty that it is not. */
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

/** From one time to another, what they share said once. */
export function times(from, to) {
  return TIME.formatRange(new Date(from), new Date(to));
}

/** "80.0% (54.8 to 93.0)". */
export function withInterval(share) {
  if (share.share === null) return "–";
  return `${percent(share.share)} (${(100 * share.low).toFixed(1)} to ${(100 * share.high).toFixed(1)})`;
}

/** What an answer's entropy and its two parts mean, in a sentence. */
export function aboutDoubt(answer) {
  const most = Math.log(Object.keys(answer.probabilities).length);
  if (answer.entropy < 0.02 * most) return "There is next to no doubt.";
  const own = answer.mutual_information / answer.entropy;
  if (own > 0.5) {
    return "Most of the doubt is the model’s own: its posterior samples disagree, as they do on inputs unlike what it was trained on.";
  }
  if (own > 0.2) {
    return "Part of the doubt is the model’s own, where its posterior samples disagree; the rest lies in the question.";
  }
  return "Most of the doubt lies in the question: each posterior sample is unsure by itself.";
}

/** Where a mutual information stands among the calibration set's; null without a calibration. */
export function rankOf(value, quantiles) {
  const known = Object.entries(quantiles ?? {}).sort(([a], [b]) => Number(a) - Number(b));
  if (known.length === 0) return null;
  const below = known.filter(([, quantile]) => quantile < value);
  if (below.length === 0) {
    return `Its mutual information is among the lowest ${percent(Number(known[0][0]), 0)} of the calibration set’s.`;
  }
  return `Its mutual information is higher than ${percent(Number(below.at(-1)[0]), 0)} of the calibration set’s.`;
}
