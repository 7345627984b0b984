"use strict";
// What ppap/evaluation/names.py reads. An entry is what a user says of a cluster: {name, id, colour, merge_into,
// ignore}, at the place of the cluster's number.

const FORMAT = 1;
const KIND = "ppap names";
const MAX_NAME = 100;
const MAX_ID = 1000;

function fresh(data) {
  return data.clusters.map((one) => ({ name: "", id: null, colour: one.colour, merge_into: null, ignore: false }));
}

// The cluster that one is merged into in the end, or null where merges go round in a circle.
function head(entries, cluster) {
  const seen = new Set([cluster]);
  while (!entries[cluster].ignore && entries[cluster].merge_into !== null) {
    cluster = entries[cluster].merge_into;
    if (seen.has(cluster)) return null;
    seen.add(cluster);
  }
  return cluster;
}

// The head of each cluster's region: merges first, then equal names; null = in a circle.
function heads(entries) {
  const found = entries.map((_, cluster) => head(entries, cluster));
  const first = new Map();
  [...new Set(found)].filter((one) => one !== null).sort((a, b) => a - b).forEach((one) => {
    const name = entries[one].name.trim().toLowerCase();
    if (!name || entries[one].ignore) return;
    if (!first.has(name)) first.set(name, one);
    found.forEach((other, cluster) => { if (other === one) found[cluster] = first.get(name); });
  });
  return found;
}

function idOf(entries, cluster) {
  return entries[cluster].id === null ? cluster : entries[cluster].id;
}

function problems(entries) {
  const found = [], owner = new Map(), regions = heads(entries);
  regions.forEach((one, cluster) => {
    if (one === null) found.push(`cluster ${cluster} is merged in a circle; end one of the merges`);
  });
  const kept = [...new Set(regions)].filter((one) => one !== null && !entries[one].ignore).sort((a, b) => a - b);
  kept.forEach((one) => {
    const id = idOf(entries, one);
    if (!Number.isInteger(id) || id < 0 || id > MAX_ID) found.push(`cluster ${one}: the id is not 0 to ${MAX_ID}`);
    else if (owner.has(id)) found.push(`clusters ${owner.get(id)} and ${one} share the id ${id}; merge them, or change one`);
    else owner.set(id, one);
  });
  if (!kept.length && !found.length) found.push("every cluster is ignored; leave one at least");
  return found;
}

function toFile(data, entries) {
  const clusters = entries.map((one, cluster) => ({
    cluster, name: one.name.trim(), id: one.id, colour: one.colour, merge_into: one.merge_into, ignore: one.ignore,
  }));
  return { kind: KIND, format: FORMAT, probe: data.probe, clusters };
}

// Entries of a file that was saved before. Throws an Error that says what is wrong with it.
function fromFile(data, stored) {
  if (!stored || stored.kind !== KIND || !Array.isArray(stored.clusters)) throw new Error("this is no file of names");
  if (stored.format !== FORMAT) throw new Error(`its format is ${stored.format}, this page reads ${FORMAT}`);
  if (stored.probe !== data.probe) throw new Error("it was made for the clusters of another run or checkpoint");
  const entries = fresh(data), count = entries.length;
  const inside = (value) => Number.isInteger(value) && value >= 0 && value < count;
  stored.clusters.forEach((one) => {
    if (!one || !inside(one.cluster)) throw new Error("it has an entry of no cluster");
    const entry = entries[one.cluster];
    if (typeof one.name === "string") entry.name = one.name.slice(0, MAX_NAME);
    if (Number.isInteger(one.id)) entry.id = one.id;
    if (/^#[0-9a-f]{6}$/i.test(one.colour || "")) entry.colour = one.colour.toLowerCase();
    if (inside(one.merge_into) && one.merge_into !== one.cluster) entry.merge_into = one.merge_into;
    entry.ignore = one.ignore === true;
  });
  return entries;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function main() {
  const find = (selector, inside = document) => inside.querySelector(selector);
  const data = JSON.parse(find("#data").textContent);
  const draftKey = `ppap-atlas-${data.probe}`;
  const cards = [];
  let entries = fresh(data), saved = true;

  const title = (k) => (entries[k].name.trim() ? `${k} – ${entries[k].name.trim()}` : `cluster ${k}`);

  function note(k, regions) {
    const entry = entries[k];
    if (entry.ignore) return "ignored: masks have no class here";
    if (regions[k] === null) return "merged in a circle";
    if (regions[k] === k) {
      const others = regions.flatMap((one, other) => (one === k && other !== k ? [other] : []));
      return others.length ? `one region with ${others.join(", ")}` : "";
    }
    return entry.merge_into === null ? `same name: one region with ${title(regions[k])}` : `part of ${title(regions[k])}`;
  }

  function show() {
    const regions = heads(entries), wrong = problems(entries);
    cards.forEach((card, k) => {
      const entry = entries[k], top = regions[k] === null ? k : regions[k];
      find(".title", card).textContent = title(k);
      find(".swatch", card).style.background = entries[top].colour;
      find(".note", card).textContent = note(k, regions);
      card.classList.toggle("ignored", entry.ignore);
      find(".id", card).disabled = find(".colour", card).disabled = top !== k;
      find(".merge", card).disabled = entry.ignore;
      [...find(".merge", card).options].forEach((option) => {
        if (option.value) option.textContent = title(Number(option.value));
      });
      find(".suggestions", card).querySelectorAll("button").forEach((button) => {
        const other = Number(button.dataset.with);
        button.hidden = regions[k] === regions[other];
        button.textContent = `Merge into ${title(other)} (${button.dataset.why})`;
      });
    });
    const list = find("#problems");
    list.hidden = !wrong.length;
    list.replaceChildren(...wrong.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    const named = entries.filter((one, k) => one.ignore || (regions[k] !== null && entries[regions[k]].name.trim())).length;
    const kept = new Set(regions.filter((one) => one !== null && !entries[one].ignore)).size;
    find("#status").textContent = `${named} of ${entries.length} clusters named, merged or ignored; ${kept} regions` + (saved ? "" : "; not saved");
    find("#save").disabled = wrong.length > 0;
  }

  function fill() {
    cards.forEach((card, k) => {
      const entry = entries[k];
      find(".name", card).value = entry.name;
      find(".id", card).value = entry.id === null ? "" : entry.id;
      find(".colour", card).value = entry.colour;
      find(".merge", card).value = entry.merge_into === null ? "" : String(entry.merge_into);
      find(".ignore", card).checked = entry.ignore;
    });
    show();
  }

  function changed() {
    saved = false;
    try { localStorage.setItem(draftKey, JSON.stringify(toFile(data, entries))); } catch { /* no storage: saving is the user's */ }
    show();
  }

  function images(box, list, alt) {
    box.replaceChildren(...list.map((source) => Object.assign(document.createElement("img"), { src: source, alt, loading: "lazy" })));
  }

  function makeCard(one, k) {
    const card = find("#card").content.firstElementChild.cloneNode(true);
    card.id = `cluster-${k}`;
    find(".share", card).textContent = `${percent(one.share)} of all pixels`;
    find(".class", card).textContent = one.class
      ? `Labels: ${one.class.name}${one.class.share === null ? " (matched in training)" : `, ${percent(one.class.share)} of its labelled pixels`}`
      : "";
    images(find(".typical", card), one.typical, `typical region of cluster ${k}`);
    images(find(".doubtful", card), one.doubtful, `doubtful region of cluster ${k}`);
    find(".doubtful-title", card).hidden = !one.doubtful.length;
    find(".near", card).textContent = one.near.length
      ? `Most similar: ${one.near.map(([other, cosine]) => `${other} (${cosine.toFixed(2)})`).join(", ")}` : "No pixel in these images.";
    const merge = find(".merge", card);
    merge.add(new Option("–", ""));
    data.clusters.forEach((_, other) => { if (other !== k) merge.add(new Option("", String(other))); });
    one.merges.forEach((found) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.dataset.with = found.with;
      button.dataset.why = `similarity ${found.cosine.toFixed(2)}, ${percent(found.border)} of its border`;
      button.addEventListener("click", () => {
        entries[k].merge_into = found.with;
        merge.value = String(found.with);
        changed();
        merge.focus(); // the button hides itself
      });
      find(".suggestions", card).append(button);
    });
    find(".id", card).placeholder = String(k);
    const on = (selector, type, change) => find(selector, card).addEventListener(type, (event) => { change(event.target); changed(); });
    on(".name", "input", (field) => { entries[k].name = field.value; });
    on(".id", "input", (field) => { entries[k].id = field.value === "" ? null : Number(field.value); });
    on(".colour", "input", (field) => { entries[k].colour = field.value; });
    on(".merge", "change", (field) => { entries[k].merge_into = field.value === "" ? null : Number(field.value); });
    on(".ignore", "change", (field) => { entries[k].ignore = field.checked; });
    return card;
  }

  function order() {
    const how = find("#order").value, numbers = data.clusters.map((_, k) => k);
    const todo = (k) => Number(entries[k].ignore || entries[k].merge_into !== null || entries[k].name.trim() !== "");
    numbers.sort((a, b) => (how === "todo" ? todo(a) - todo(b) : 0) || (how === "cluster" ? 0 : data.clusters[b].share - data.clusters[a].share) || a - b);
    find("#clusters").append(...numbers.map((k) => cards[k]));
  }

  function save() {
    if (problems(entries).length) { find("#problems").scrollIntoView(); return; }
    const text = JSON.stringify(toFile(data, entries), null, 2) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "names.json";
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    saved = true;
    try { localStorage.removeItem(draftKey); } catch { /* as above */ }
    show();
  }

  async function open(event) {
    const [file] = event.target.files;
    if (!file) return;
    try {
      entries = fromFile(data, JSON.parse(await file.text()));
      saved = true;
      fill();
    } catch (error) {
      find("#status").textContent = `${file.name} cannot be used: ${error.message}`;
    }
    event.target.value = "";
  }

  find("#about").textContent = data.about;
  find("#warning").textContent = data.warning || "";
  find("#warning").hidden = !data.warning;
  cards.push(...data.clusters.map(makeCard));
  try {
    const draft = localStorage.getItem(draftKey);
    if (draft) { entries = fromFile(data, JSON.parse(draft)); saved = false; }
  } catch { /* an older draft, or no storage */ }
  order();
  fill();
  find("#order").addEventListener("change", order);
  find("#save").addEventListener("click", save);
  find("#open").addEventListener("change", open);
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "s") { event.preventDefault(); save(); }
  });
  window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
}

if (typeof document !== "undefined") main();
if (typeof module !== "undefined") module.exports = { fresh, head, heads, problems, toFile, fromFile };
