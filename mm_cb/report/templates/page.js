"use strict";
const tools = document.querySelector(".tools");
if (tools) {
  const gallery = document.querySelector(".gallery");
  const cards = [...gallery.children];
  const find = tools.querySelector("input");
  const order = tools.querySelector("select");
  const count = tools.querySelector("output");
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const show = () => {
    const words = find.value.toLowerCase().split(" ").filter(Boolean);
    for (const card of cards) card.hidden = !words.every((word) => texts.get(card).includes(word));
    count.value = cards.filter((card) => getComputedStyle(card).display !== "none").length + " of " + cards.length;
  };
  const sort = () => {
    const key = order.value;
    const by = {
      shown: (a, b) => cards.indexOf(a) - cards.indexOf(b),
      loss: (a, b) => a.dataset.loss - b.dataset.loss,
      outcome: (a, b) => a.dataset.rank - b.dataset.rank,
      id: (a, b) => (a.id < b.id ? -1 : 1),
    }[key];
    gallery.append(...[...cards].sort(by));
  };
  find.addEventListener("input", show);
  order.addEventListener("change", sort);
  for (const radio of document.querySelectorAll("#gallery > input")) radio.addEventListener("change", show);
  tools.hidden = false;
  show();
}
