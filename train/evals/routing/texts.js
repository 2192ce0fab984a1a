// Text by expert: the tokens of a document on the colours of their first experts, for any layer.
for (const figure of $$("figure.texts")) {
  const { layers, experts, k, texts } = dataOf(figure);
  const decode = code => new Uint16Array(Uint8Array.from(atob(code), c => c.charCodeAt(0)).buffer);
  for (const text of texts) { text.expert = decode(text.expert); text.gate = decode(text.gate); text.control = new Set(text.control); }
  const domains = [...new Set(texts.map(text => text.domain))], bar = make("div", { class: "bar" }, figure);
  let domain = domains[0], layer = layers.length - 1, alone = null;
  const underline = expert => ["none", "underline", "underline dotted", "underline wavy"][Math.floor(expert / 8) % 4];
  const look = expert => ({ style: `text-decoration: ${underline(expert)}`, class: `c${expert % 8}` });
  const chooseDomain = chooser("domain", domains, domain, bar, name => { domain = name; render(); });
  const chooseLayer = chooser("layer", layers.map(String), String(layers[layer]), bar, name => { layer = layers.map(String).indexOf(name); render(); });
  const legend = make("div", { class: "experts", role: "group", "aria-label": "experts" }, bar);
  const buttons = Array.from({ length: experts }, (_, expert) => {
    const button = make("button", { type: "button", ...look(expert) }, legend, expert);
    button.addEventListener("click", () => { alone = alone === expert ? null : expert; render(); });
    return button;
  });
  const body = make("div", {}, figure);

  function tell(text, i, element) {
    const at = (layer * text.pieces.length + i) * k, box = element.getBoundingClientRect();
    const rows = Array.from({ length: k }, (_, c) => [`c${text.expert[at + c] % 8}`, `expert ${text.expert[at + c]}`, (text.gate[at + c] / 1000).toFixed(3)]);
    show(`${JSON.stringify(text.pieces[i])}, layer ${layers[layer]}`, rows, box.left, box.bottom);
  }

  function render() {
    hide();
    body.replaceChildren();
    buttons.forEach((button, expert) => button.setAttribute("aria-pressed", alone === expert));
    for (const text of texts.filter(one => one.domain === domain)) {
      const block = make("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `${domain}, layer ${layers[layer]}` }, body);
      const pieces = text.pieces.map((piece, i) => {
        const expert = text.expert[(layer * text.pieces.length + i) * k];
        const element = make("b", look(expert), block, piece.replaceAll("\n", "↵\n") || "·");
        element.classList.toggle("control", !piece || text.control.has(i));
        element.classList.toggle("dim", alone !== null && alone !== expert);
        element.addEventListener("pointerenter", () => tell(text, i, element));
        element.addEventListener("pointerleave", hide);
        return element;
      });
      block.addEventListener("blur", () => { hide(); block.querySelector(".here")?.classList.remove("here"); });
      block.addEventListener("keydown", event => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], up = { ArrowUp: -1, ArrowDown: 1 }[event.key];
        if (!move && !up) return;
        event.preventDefault();
        const blocks = $$(".tokens", body), number = blocks.indexOf(block);
        let here = pieces.findIndex(piece => piece.classList.contains("here"));
        if (up) {
          layer = Math.max(0, Math.min(layers.length - 1, layer + up));
          chooseLayer(String(layers[layer]));
          render();
          focusOn(number, here);
        } else focusOn(number, Math.max(0, Math.min(pieces.length - 1, here + move)));
      });
    }
  }

  function focusOn(number, i) {
    const block = $$(".tokens", body)[number], text = texts.filter(one => one.domain === domain)[number];
    block.focus({ preventScroll: true });
    block.querySelector(".here")?.classList.remove("here");
    if (i < 0) return;
    block.querySelectorAll("b")[i].classList.add("here");
    tell(text, i, block.querySelectorAll("b")[i]);
  }
  render();
}
