// Sorts and filters the table of images, and enlarges them; without it the table stands as it is.
"use strict";
(() => {
  const table = document.getElementById("images");
  const form = document.getElementById("filter");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator("en", { numeric: true });

  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));

  const sort = (head) => {
    const column = heads.indexOf(head);
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = direction === "ascending" ? 1 : -1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
    rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
    body.append(...rows);
  };

  for (const head of heads.filter((head) => head.dataset.sort !== undefined)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head));
    head.replaceChildren(button);
  }

  const dialog = document.getElementById("enlarged");
  const enlarge = (picture) => {
    const caption = document.createElement("figcaption");
    caption.textContent = picture.alt;
    dialog.querySelector("figure").replaceChildren(picture.cloneNode(), caption);
    dialog.showModal();
  };
  for (const picture of table.querySelectorAll("td img")) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Enlarge";
    button.addEventListener("click", () => enlarge(picture));
    picture.replaceWith(button);
    button.append(picture);
  }
  dialog.addEventListener("click", () => dialog.close());

  const filter = () => {
    const text = form.elements.text.value.trim().toLowerCase();
    const kind = form.elements.kind.value;
    const least = Number(form.elements.least.value) || 0;
    let shown = 0;
    for (const row of rows) {
      const fits =
        (kind === "all" || row.dataset.kind.split(" ").includes(kind)) &&
        form.dataset.scale * row.dataset.radius >= least &&
        row.dataset.text.toLowerCase().includes(text);
      row.hidden = !fits;
      shown += fits;
    }
    form.elements.count.value = `${shown} of ${rows.length} images`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
})();
