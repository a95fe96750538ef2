// Creates elements without markup, so that text is never interpreted as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. An attribute that is a function becomes an event listener, true an empty attribute; null, undefined
 * and false are left out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export function byId(name) {
  return document.getElementById(name);
}

/** Run `change`, which replaces an element's contents, and restore the keyboard focus in it. */
export function keepingFocus(element, change) {
  const reachable = () => [...element.querySelectorAll("input, summary, button, [tabindex]")];
  const at = reachable().indexOf(document.activeElement);
  change();
  if (at >= 0) reachable()[at]?.focus({ preventScroll: true });
}

/** A choice between a few options: radio buttons that look like one control. */
export function segmented(name, legend, options, chosen, onChange) {
  return h(
    "fieldset",
    { class: "segmented" },
    h("legend", { class: "unseen" }, legend),
    Object.entries(options).map(([value, text]) =>
      h(
        "label",
        {},
        h("input", { type: "radio", name, value, checked: value === chosen, change: () => onChange(value) }),
        h("span", {}, text),
      ),
    ),
  );
}

/** A table of the numbers behind a figure. `rows` are lists of texts; the first text of a row is its header. */
export function table(caption, heads, rows, open = false) {
  return h(
    "details",
    { class: "behind", open },
    h("summary", {}, "The numbers"),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      h(
        "table",
        {},
        h("caption", { class: "unseen" }, caption),
        h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
        h(
          "tbody",
          {},
          rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row" }, first), rest.map((cell) => h("td", {}, cell)))),
        ),
      ),
    ),
  );
}
