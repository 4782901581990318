"use strict";

const form = document.getElementById("filter");

if (form) {
  const rows = [...document.querySelectorAll("tr[data-verb]")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const groups = [...document.querySelectorAll("details.group")];
  const opened = new Map(groups.map((group) => [group, group.open]));
  const shown = document.getElementById("shown");

  const matches = (row, text, wanted) =>
    wanted.words.every((word) => text.includes(word)) &&
    wanted.verbs.has(row.dataset.verb) &&
    (!wanted.operator || row.dataset.operator === wanted.operator) &&
    (!wanted.layer || row.dataset.layer === wanted.layer) &&
    (!wanted.by || row.dataset.by.split("|").includes(wanted.by));

  const update = () => {
    const boxes = [...form.querySelectorAll("input[name=verb]")];
    const choice = (name) => form.elements[name]?.value ?? "";
    const wanted = {
      words: form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean),
      verbs: new Set(boxes.filter((box) => box.checked).map((box) => box.value)),
      operator: choice("operator"),
      layer: choice("layer"),
      by: choice("by"),
    };
    const filtering =
      wanted.words.length || wanted.verbs.size < boxes.length || wanted.operator || wanted.layer || wanted.by;
    const visible = new Set();
    let count = 0;
    rows.forEach((row, index) => {
      row.hidden = !matches(row, texts[index], wanted);
      if (!row.hidden) {
        count += 1;
        visible.add(row.closest("details.group"));
      }
    });
    for (const group of groups) {
      group.hidden = !visible.has(group);
      group.open = filtering ? visible.has(group) : opened.get(group);
    }
    const all = rows.length.toLocaleString("en");
    shown.textContent = filtering ? `${count.toLocaleString("en")} of ${all} changed nodes shown` : `${all} nodes changed`;
  };

  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  for (const button of document.querySelectorAll("button.jump")) {
    button.addEventListener("click", () => {
      form.reset();
      form.elements.layer.value = button.dataset.layer;
      update();
      document.getElementById("nodes").scrollIntoView();
    });
  }
}

const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const closed = target?.closest("details");
  if (closed) {
    closed.open = true;
    target.scrollIntoView({ block: "center" });
  }
};

addEventListener("hashchange", reveal);
reveal();
