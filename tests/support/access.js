// What stands in the way of people who cannot see the page well: sentences, [] if nothing does.
const found = [];
const seen = (element) => element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
const words = (element) => `<${element.tagName.toLowerCase()} class="${element.getAttribute("class") || ""}"> ${(element.textContent || "").trim().slice(0, 40)}`;

function numbers(colour) {
  const [red, green, blue, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
  return [red, green, blue, alpha];
}
function luminance([red, green, blue]) {
  const [r, g, b] = [red, green, blue].map((one) => {
    const share = one / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour[3] === 1) return colour;
    if (colour[3] > 0) found.push(`half transparent behind ${words(element)}`);
  }
  return [255, 255, 255, 1];
}
function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let checked = 0;
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !seen(element) || element.closest("script, noscript, title, .unseen, .skip, :disabled")) continue;
  const style = getComputedStyle(element);
  const own = element.closest("svg") ? numbers(style.fill) : numbers(style.color);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  // A label in a bar of the timeline stands on the bar.
  const bar = element.classList.contains("attempt-text") ? element.previousElementSibling : null;
  const behind = bar ? numbers(getComputedStyle(bar).fill) : background(element);
  const ratio = contrast(own, behind);
  checked += 1;
  if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)} of ${words(element)}`);
}
if (checked < 10) found.push(`only ${checked} texts were looked at`);

const one = (selector) => {
  const count = [...document.querySelectorAll(selector)].filter(seen).length;
  if (count !== 1) found.push(`${count} of ${selector}`);
};
["header", "main", "nav[aria-label='Pages']", "h1"].forEach(one);
if (!document.documentElement.lang) found.push("no language");
if (!/ · dtrain$/.test(document.title)) found.push(`the title is ${document.title}`);
let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
  if (!seen(heading) || heading.closest(".card")) continue;
  const now = Number(heading.tagName[1]);
  if (now > level + 1) found.push(`a heading of level ${now} after ${level}`);
  level = now;
}
for (const table of document.querySelectorAll("table")) {
  if (!table.caption?.textContent) found.push("a table without a caption");
  for (const head of table.querySelectorAll("thead th")) if (head.scope !== "col") found.push(`no scope: ${words(head)}`);
  for (const row of table.querySelectorAll("tbody tr")) if (row.children[0].tagName !== "TH") found.push(`no heading: ${words(row)}`);
}
for (const region of document.querySelectorAll(".scroll[role=region]")) {
  if (region.tabIndex < 0 || !region.getAttribute("aria-label")) found.push(`cannot be scrolled by keys: ${words(region)}`);
}
for (const image of document.querySelectorAll("svg[role=img]")) if (!image.getAttribute("aria-label")) found.push("a picture without words");
for (const control of document.querySelectorAll("input, select")) if (!control.labels?.length) found.push(`no label: ${control.id}`);
if (document.querySelector("[tabindex]:not([tabindex='0']):not([tabindex='-1'])")) found.push("an order of its own");
if (!document.querySelector("[aria-live=polite]")) found.push("nothing is announced");
return [...new Set(found)];
