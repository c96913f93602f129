// One person's phone in the sandbox. Everything shown comes from GET /people/{me}/screen, asked again whenever something changed.
"use strict";

const $ = (id) => document.getElementById(id);
const EMOJIS = ["👍", "❤️", "😂", "😮", "😢", "🙏"];
const TICKS = { sent: "✓", delivered: "✓✓", read: "✓✓" };
const state = { me: "", other: "", version: 0, screen: null, aim: null, busy: null, typed: 0, shown: "", follows: true };

const bare = (number) => number.replace("+", "");
const mine = () => `/people/${bare(state.me)}`;
const isGroup = (id) => !id.startsWith("+");
const person = (number) => state.screen?.people.find((p) => p.number === number);
const nameOf = (id) =>
  person(id)?.name || state.screen?.groups.find((g) => g.id === id)?.name || id;

// --- small tools ---

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

async function call(path, body, method = "POST") {
  const options = body === undefined ? {} : { method, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
}

let told = 0;
function tell(text, bad = false) {
  clearTimeout(told);
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
  if (text) told = setTimeout(() => tell(""), bad ? 8000 : 3000);
}

const attempt = (work) => async (...args) => {
  try { await work(...args); } catch (error) { tell(error.message, true); }
};

const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const day = (at) => new Date(at * 1000).toLocaleDateString([], { weekday: "long", day: "numeric", month: "long" });

const base64 = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.split(",", 2)[1] || "");
  reader.onerror = () => reject(new Error("the file cannot be read"));
  reader.readAsDataURL(file);
});

// A small form in a dialog: fields are [name, label, type, value]; undefined when it is cancelled.
function ask(title, fields) {
  const dialog = $("ask"), box = dialog.querySelector(".fields");
  dialog.querySelector("h2").textContent = title;
  box.replaceChildren(...fields.map(([name, label, type = "text", value = ""]) => {
    const input = type === "lines" ? el("textarea", { rows: 4 }) : el("input", { type, step: "any" });
    input.name = name; input.value = value; input.required = type !== "optional";
    if (type === "optional") input.type = "text";
    return el("label", {}, label, input);
  }));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    const inputs = [...box.querySelectorAll("input, textarea")];
    resolve(dialog.returnValue ? Object.fromEntries(inputs.map((i) => [i.name, i.value.trim()])) : undefined);
  }, { once: true }));
}

function menu(near, items) {
  const box = $("menu");
  box.replaceChildren(...items.map((item) => Array.isArray(item)
    ? el("button", { type: "button", role: "menuitem", class: "quiet", onclick: () => { close(); attempt(item[1])(); } }, item[0])
    : item));
  box.hidden = false;
  const at = near.getBoundingClientRect(), size = box.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${at.bottom + size.height + 8 < innerHeight ? at.bottom + 4 : Math.max(8, at.top - size.height - 4)}px`;
  box.querySelector("button").focus();
  function close() { box.hidden = true; near.focus(); }
  box.onkeydown = (event) => {
    const all = [...box.querySelectorAll("button")], now = all.indexOf(document.activeElement);
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown") all[(now + 1) % all.length].focus();
    else if (event.key === "ArrowUp") all[(now + all.length - 1) % all.length].focus();
    else return;
    event.preventDefault();
  };
}
addEventListener("pointerdown", (event) => { if (!$("menu").contains(event.target)) $("menu").hidden = true; });

// --- sending ---

function send(fields) {
  const where = isGroup(state.other) ? { group: state.other } : { to: state.other };
  return call(`${mine()}/send`, { ...where, ...fields });
}

function aim(what, message) {
  state.aim = message ? { what, message } : null;
  $("aim").hidden = !message;
  if (message) {
    $("aim").firstElementChild.textContent = `${what === "edit" ? "Editing" : "Answering"}: ${message.text || message.kind}`;
    if (what === "edit") $("text").value = message.text;
    $("text").focus();
  }
}

async function write() {
  const text = $("text").value.trim(), aimed = state.aim;
  if (!text || !state.other) return;
  $("text").value = "";
  aim("", null);
  resize();
  try {
    if (aimed?.what === "edit") await send({ kind: "edit", target: aimed.message.id, text });
    else await send(aimed ? { text, quoted: aimed.message.id } : { text });
  } catch (error) {
    $("text").value = text;
    throw error;
  }
}

function choose(kind, accept) {
  const input = $("file");
  input.accept = accept;
  input.value = "";
  input.onchange = attempt(async () => {
    const file = input.files[0];
    if (!file) return;
    tell(`Sending ${file.name} …`);
    const caption = $("text").value.trim();
    const fields = { kind, data: await base64(file), mimetype: file.type || "application/octet-stream", filename: file.name };
    if (caption && ["image", "video", "document"].includes(kind)) { fields.text = caption; $("text").value = ""; }
    await send(fields);
    tell("");
  });
  input.click();
}

const OTHER_KINDS = [
  ["Picture", () => choose("image", "image/*")],
  ["Video", () => choose("video", "video/*")],
  ["Voice note", () => choose("voice", "audio/*")],
  ["Document", () => choose("document", "")],
  ["Sticker", () => choose("sticker", "image/webp,image/png")],
  ["Place", async () => {
    const found = await ask("A place", [["name", "Name", "text", "KLCC Park"], ["address", "Address", "optional", "Kuala Lumpur"],
      ["latitude", "Latitude", "number", "3.1555"], ["longitude", "Longitude", "number", "101.7149"]]);
    if (found) await send({ kind: "location", ...found, latitude: +found.latitude, longitude: +found.longitude });
  }],
  ["Contact", async () => {
    const found = await ask("A contact", [["name", "Name"], ["phone", "Phone", "text", "+60"]]);
    if (found) await send({ kind: "contacts", contacts: [found] });
  }],
  ["Poll", async () => {
    const found = await ask("A poll", [["question", "Question"], ["options", "Options, one a line", "lines"]]);
    const options = found?.options.split("\n").map((o) => o.trim()).filter(Boolean);
    if (found) await send({ kind: "poll", question: found.question, options });
  }],
];

async function act(message, button) {
  const row = el("div", { class: "emojis", role: "none" }, ...EMOJIS.map((emoji) => el("button", {
    type: "button", role: "menuitem", class: "quiet", "aria-label": `React with ${emoji}`,
    onclick: attempt(async () => { $("menu").hidden = true; await send({ kind: "reaction", target: message.id, emoji }); }),
  }, emoji)));
  const items = [row, ["Reply", () => aim("reply", message)]];
  if (message.reactions.length) items.push(["Take reaction back", () => send({ kind: "reaction", target: message.id })]);
  if (message.mine && message.tick) {
    if (message.kind === "text") items.push(["Edit", () => aim("edit", message)]);
    items.push(["Delete for everyone", () => send({ kind: "revoke", target: message.id })]);
  }
  if (!message.mine && !message.read) {
    items.push(["Mark read", () => call(`${mine()}/receipt`, { id: message.id, kind: "read" })]);
  }
  menu(button, items);
}

// --- drawing ---

function body(message) {
  if (message.deleted) return [el("span", { class: "gone" }, "This message was deleted")];
  const { kind, about, text, media } = message, parts = [];
  if (kind === "image") parts.push(el("img", { class: "photo", src: media, alt: text || "Picture", onclick: () => zoom(media) }));
  else if (kind === "sticker") parts.push(el("img", { class: "photo sticker", src: media, alt: "Sticker" }));
  else if (kind === "video") parts.push(el("video", { src: media, controls: true, preload: "metadata" }));
  else if (kind === "audio" || kind === "voice") parts.push(el("audio", { src: media, controls: true, preload: "metadata" }));
  else if (kind === "document") {
    const size = `${Math.max(1, Math.round(about.size / 1024)).toLocaleString()} KB`;
    parts.push(el("a", { class: "card", href: media, download: about.filename || "document" }, `📄 ${about.filename || "Document"}`, el("small", {}, `${about.mimetype} · ${size}`)));
  } else if (kind === "location" || kind === "live_location") {
    const at = `${about.latitude.toFixed(5)}, ${about.longitude.toFixed(5)}`;
    parts.push(el("span", { class: "card" }, `📍 ${about.name || (kind === "location" ? "Place" : "Live position")}`, el("small", {}, [about.address, at].filter(Boolean).join(" · "))));
  } else if (kind === "contact" || kind === "contacts") {
    for (const card of about.contacts) parts.push(el("span", { class: "card" }, `👤 ${card.name}`, el("small", {}, /TEL[^:]*:(.+)/.exec(card.vcard)?.[1] || "")));
  } else if (kind === "poll") {
    parts.push(el("strong", {}, about.question));
    const own = message.votes[state.me] || [];
    for (const option of about.options) {
      const count = Object.values(message.votes).filter((chosen) => chosen.includes(option)).length;
      const chosen = own.includes(option) ? own.filter((o) => o !== option) : about.choices === 1 ? [option] : [...own, option];
      parts.push(el("button", { type: "button", class: "option", "aria-pressed": String(own.includes(option)),
        onclick: attempt(() => send({ kind: "vote", target: message.id, options: chosen })) }, option, el("b", {}, String(count))));
    }
  }
  if (about.preview) parts.push(el("span", { class: "card" }, about.preview.title, el("small", {}, about.preview.description || about.preview.url)));
  if (text) parts.push(text);
  if (!parts.length) parts.push(el("span", { class: "odd" }, kind));
  return parts;
}

function bubble(message) {
  const meta = el("span", { class: "meta" }, message.edited ? "edited " : "", clock(message.at), " ");
  if (message.mine) {
    meta.append(message.tick ? el("span", { class: `tick ${message.tick}`, title: message.tick, "aria-label": message.tick }, TICKS[message.tick]) : el("span", { title: "sent by a linked device" }, "linked"));
  } else if (!message.read) meta.append(el("span", { title: "not read yet" }, "•"));
  const node = el("li", { class: `message ${message.mine ? "mine" : ""} ${message.reactions.length ? "reacted" : ""}` });
  node.append(
    ...(isGroup(state.other) && !message.mine ? [el("span", { class: "by" }, message.name)] : []),
    ...(message.quoted ? [el("span", { class: "quote" }, el("strong", {}, message.quoted.sender), ` ${message.quoted.text}`)] : []),
    ...body(message), meta,
    ...(message.reactions.length ? [el("span", { class: "reactions", "aria-label": `Reactions: ${message.reactions.join(" ")}` }, message.reactions.join(" "))] : []),
  );
  if (!message.deleted) {
    const button = el("button", { type: "button", class: "act", "aria-label": "What to do with this message", "aria-haspopup": "menu" }, "▾");
    button.onclick = () => act(message, button);
    node.append(button);
  }
  return node;
}

function zoom(source) {
  $("picture").querySelector("img").src = source;
  $("picture").showModal();
}

function drawMessages() {
  const list = $("messages"), { messages } = state.screen;
  const key = JSON.stringify([state.me, state.other, messages]);
  if (key === state.shown) return; // a picture that loads or a video that plays must not start again for nothing
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80 || !state.shown.startsWith(JSON.stringify([state.me, state.other]).slice(0, -1));
  state.shown = key;
  const nodes = [];
  let last = "";
  for (const message of messages) {
    if (day(message.at) !== last) nodes.push(el("li", { class: "day" }, (last = day(message.at))));
    nodes.push(bubble(message));
  }
  if (!nodes.length) nodes.push(el("li", { class: "empty" }, state.other ? `Nothing yet. Write to ${nameOf(state.other)} below.` : "Choose a chat."));
  list.replaceChildren(...nodes);
  state.follows = atEnd;
  if (atEnd) list.scrollTop = list.scrollHeight;
}
// A picture has no height until it is there.
$("messages").addEventListener("load", () => { if (state.follows) $("messages").scrollTop = $("messages").scrollHeight; }, true);
$("messages").addEventListener("wheel", () => { state.follows = false; }, { passive: true });
$("messages").addEventListener("touchmove", () => { state.follows = false; }, { passive: true });

function drawChats() {
  const { people, groups, chats } = state.screen;
  const known = new Map(chats.map((chat) => [chat.chat, chat]));
  const others = people.filter((p) => p.number !== state.me && !known.has(p.number));
  others.sort((a, b) => b.devices.length - a.devices.length);
  const ids = [...chats.map((c) => c.chat), ...groups.map((g) => g.id).filter((id) => !known.has(id)), ...others.map((p) => p.number)];
  $("chats").replaceChildren(...ids.filter((id) => id !== state.me).slice(0, 60).map((id) => {
    const chat = known.get(id) || {}, name = nameOf(id), business = person(id)?.devices.length;
    const colour = [...id].reduce((sum, c) => (sum * 31 + c.charCodeAt(0)) % 997, 7) % 6;
    return el("li", {}, el("button", { type: "button", "aria-current": String(id === state.other), onclick: () => open(id) },
      el("span", { class: `face c${colour}`, "aria-hidden": "true" }, (isGroup(id) ? "#" : name.replace("+", "")[0] || "?").toUpperCase()),
      el("span", { class: "name" }, name), el("time", {}, chat.at ? clock(chat.at) : ""),
      el("span", { class: "last" }, chat.text || (business ? "business number" : isGroup(id) ? "group" : id)),
      chat.unread ? el("span", { class: "count", "aria-label": `${chat.unread} unread` }, String(chat.unread)) : el("span")));
  }));
}

function drawPhone() {
  const me = person(state.me);
  if (!me) return;
  $("receipts").value = me.auto_receipts || "none";
  $("devices").replaceChildren(...(me.devices.length ? me.devices.map((device) => el("li", {},
    el("span", { class: `dot ${device.online ? "on" : ""}` }),
    el("span", {}, `Device ${device.device}: ${device.online ? "online" : "offline"}${device.waiting ? `, ${device.waiting} waiting` : ""}`),
    el("button", { type: "button", class: "quiet", onclick: attempt(() => call(`${mine()}/devices/${device.device}`, { do: "remove" })) }, "Log out")))
    : [el("li", {}, "none: this is a customer's phone")]));
}

function draw() {
  const { people } = state.screen;
  const options = people.map((p) => el("option", { value: p.number }, `${p.name} ${p.devices.length ? "(business)" : ""} ${p.number}`));
  if ($("me").options.length !== options.length) $("me").replaceChildren(...options);
  $("me").value = state.me;
  const other = person(state.other), group = state.screen.groups.find((g) => g.id === state.other);
  $("other").textContent = state.other ? nameOf(state.other) : "No chat";
  const online = other?.devices.filter((d) => d.online).length;
  $("about").textContent = group ? `${group.members.length} members` : !other ? "" :
    other.devices.length ? `${other.number} · ${online ? "linked device online" : "linked device offline"}` : other.number;
  $("typing").hidden = !state.screen.typing;
  $("call").hidden = !other;
  for (const id of ["text", "send", "more", "mark"]) $(id).disabled = !state.other;
  document.title = `${person(state.me)?.name || ""} – WhatsApp sandbox`;
  drawChats();
  drawPhone();
  drawMessages();
}

// --- following what happens ---

function open(other) {
  state.other = other;
  document.body.classList.add("open");
  aim("", null);
  remember();
  follow();
}

function remember() {
  history.replaceState(null, "", `#me=${bare(state.me)}&with=${bare(state.other)}`);
}

function settle(people) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const numbers = people.map((p) => p.number);
  const business = people.find((p) => p.devices.length) || people[0];
  const customer = people.find((p) => p !== business) || business;
  state.me = numbers.find((n) => bare(n) === wanted.get("me")) || customer?.number || "";
  const other = wanted.get("with") || "";
  state.other = numbers.find((n) => bare(n) === other) || (other.length > 15 ? other : business !== customer ? business.number : "");
  if (state.other === state.me) state.other = "";
}

async function follow() {
  state.busy?.abort();
  const stop = (state.busy = new AbortController());
  let seen = 0, wait = 0;
  while (!stop.signal.aborted) {
    try {
      const query = new URLSearchParams({ with: state.other, seen, wait });
      const answer = await fetch(`${mine()}/screen?${query}`, { signal: stop.signal });
      if (!answer.ok) throw new Error((await answer.json()).error);
      const found = await answer.json();
      if (stop.signal.aborted) return;
      if ($("state").textContent === "The sandbox does not answer") tell("");
      state.screen = found;
      seen = found.version;
      wait = found.typing ? 5 : 25;
      draw();
    } catch (error) {
      if (stop.signal.aborted) return;
      tell(error instanceof TypeError ? "The sandbox does not answer" : error.message, true);
      wait = 0;
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }
}

function resize() {
  $("text").style.height = "auto";
  $("text").style.height = `${Math.min($("text").scrollHeight + 2, 128)}px`;
}

// --- what the person does ---

$("write").onsubmit = (event) => { event.preventDefault(); attempt(write)(); };
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); attempt(write)(); }
  if (event.key === "Escape") aim("", null);
};
$("text").oninput = attempt(async () => {
  resize();
  if (Date.now() - state.typed < 4000 || isGroup(state.other)) return;
  state.typed = Date.now();
  await call(`${mine()}/typing`, { to: state.other });
});
$("text").onpaste = attempt(async (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  await send({ kind: "image", data: await base64(file), mimetype: file.type });
});
$("more").onclick = () => menu($("more"), OTHER_KINDS);
$("aim").lastElementChild.onclick = () => { if (state.aim?.what === "edit") $("text").value = ""; aim("", null); };
$("mark").onclick = attempt(() => call(`${mine()}/chats/${bare(state.other)}/read`, {}));
$("call").onclick = attempt(async () => {
  const { call: id } = await call(`${mine()}/calls`, { to: state.other }), to = state.other, from = mine();
  tell(`Ringing ${nameOf(to)} …`);
  setTimeout(attempt(() => call(`${from}/calls/${id}/end`, { to })), 20000);
});
$("back").onclick = () => document.body.classList.remove("open");
$("me").onchange = () => {
  state.me = $("me").value;
  if (state.other === state.me) state.other = "";
  document.body.classList.remove("open");
  remember();
  follow();
};
$("receipts").onchange = attempt(() => call(mine(), { auto_receipts: $("receipts").value }, "PATCH"));
$("link").onsubmit = attempt(async (event) => {
  event.preventDefault();
  const typed = $("qr").value.trim();
  tell("Linking …");
  await (/^[A-Z0-9]{4}-?[A-Z0-9]{4}$/i.test(typed) ? call(`${mine()}/code`, { code: typed }) : call(`${mine()}/scan`, { qr: typed }));
  $("qr").value = "";
  tell("Linked");
});
$("new-person").onclick = attempt(async () => {
  const found = await ask("A new person", [["name", "Name"], ["number", "Phone number", "tel", `+6011${Math.floor(1e6 + Math.random() * 9e6)}`]]);
  if (!found) return;
  const made = await call("/people", { ...found, auto_receipts: "delivered" });
  state.me = made.number;
  if (!state.other || state.other === state.me) state.other = state.screen.people.find((p) => p.devices.length)?.number || "";
  remember();
  follow();
});
$("picture").onclick = (event) => { if (event.target === $("picture")) $("picture").close(); };

attempt(async () => {
  settle(await call("/people"));
  if (location.hash.includes("with=")) document.body.classList.add("open");
  if (state.me) follow();
  else tell("Nobody is here yet: add a person");
})();
