for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const read = (row, column) => row.cells[column].textContent.trim();
  const number = text => parseFloat(text.replace(/,/g, "").replace(/^[<\s]+/, ""));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows], words = rows.every(row => isNaN(number(read(row, column))));
      rows.sort((one, other) => {
        const a = read(one, column), b = read(other, column);
        if (words) return sign * a.localeCompare(b);
        const x = number(a), y = number(b);
        return isNaN(x) ? (isNaN(y) ? 0 : 1) : isNaN(y) ? -1 : sign * (x - y);
      });
      body.append(...rows);
    };
  });
}
