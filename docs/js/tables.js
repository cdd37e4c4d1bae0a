// Of a table with sentences in it a phone shows a list (css/atlas.css): each cell below the other, with the name of its column.
for (const table of document.querySelectorAll("article table:not([class])")) {
  const names = [...table.querySelectorAll("th")].map((cell) => cell.textContent);
  const rows = [...table.querySelectorAll("tbody tr")].map((row) => [...row.children]);
  if (names.length > 2 && rows.flat().some((cell) => cell.textContent.length > 40)) {
    table.dataset.sentences = "";
    rows.forEach((row) => row.forEach((cell, at) => (cell.dataset.name = names[at])));
  }
}
