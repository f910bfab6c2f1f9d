// Numbers and names as people read them.
export function number(value, digits = 3) {
  if (value == null) return "∞";
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  if (Math.abs(value) < 0.001) return value.toExponential(1).replace("e-", "e−");
  return value.toPrecision(digits);
}

export const count = (value) => value.toLocaleString("en");

export function percent(share) {
  if (share >= 0.9995) return "100 %";
  if (share >= 0.0995) return `${(share * 100).toFixed(1)} %`;
  return share >= 0.00005 ? `${(share * 100).toFixed(2)} %` : "< 0.01 %";
}

export function seconds(value) {
  return value >= 10 ? `${value.toFixed(1)} s` : value >= 0.1 ? `${value.toFixed(2)} s` : `${(value * 1000).toFixed(1)} ms`;
}

export function className(info, label) {
  return info.classes.find((found) => found.label === label)?.name ?? (label < 0 ? "" : String(label));
}
