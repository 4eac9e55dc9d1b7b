"use strict";

// Tables are sorted by their heads: numbers by size, the largest first, words from A to Z.
function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  const numbers = typeof a === "number" && typeof b === "number";
  if (numbers) return b - a;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b);
}

function sort(button) {
  const head = button.closest("th");
  const body = button.closest("table").tBodies[0];
  const back = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", back ? "ascending" : "descending");
  const rows = Array.from(body.rows, (row) => [key(row, head.cellIndex), row]);
  rows.sort((a, b) => (back ? -1 : 1) * compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
}

function filter(form) {
  const chosen = [...new FormData(form)].filter(([, value]) => value);
  let shown = 0;
  for (const row of document.querySelectorAll("#images tbody tr")) {
    row.hidden = chosen.some(([name, value]) => row.dataset[name] !== value);
    if (!row.hidden) shown += 1;
  }
  form.querySelector("output").textContent = shown + " shown";
}

// What a link leads to may be folded.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  const folded = target && target.closest("details");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button));
}
for (const form of document.querySelectorAll("form.filter")) {
  form.addEventListener("input", () => filter(form));
}
window.addEventListener("hashchange", unfold);
unfold();
