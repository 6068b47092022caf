// The page's behaviour: takes one picture, asks /v1/classify and /v1/search, shows what they say.
// Everything from outside enters the page as text, never as markup.

const RETRIES = 3;
const LONGEST_WAIT_S = 60;
const SIBLINGS_SHOWN = 12;
const KEY = "rayograph-key";
const READING = "Reading image…";
const METRICS = { auroc: "AUROC", ece: "Calibration error (ECE)", f1_macro: "F1, macro", map_at_r: "MAP@R" };
const PICTURE = /^data:image\/(png|jpeg|webp|gif);base64,/;

const at = (id) => document.getElementById(id);
const state = {
  info: null, // the answer of /v1/model
  learning: null, // the promise of it
  key: stored(),
  keyGiven: null, // the promise that the user has given a key
  picture: null, // the file last taken
  request: null, // its AbortController while it is in work
  address: null, // its object URL
  done: "", // what the status says when all is done
};

class Problem extends Error {
  constructor(message, { status = 0, again = false } = {}) {
    super(message);
    this.status = status;
    this.again = again;
  }
}

// Small helpers

function stored() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return ""; // storage is switched off: the key lives as long as the page
  }
}

function store(key) {
  state.key = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // as above
  }
}

function element(tag, { text, className, ...attributes } = {}, children = []) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const words = (label) => String(label).replaceAll("_", " ").trim();
const leaf = (label) => words(String(label).split("/").at(-1));
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const pathOf = (label) => String(label).split("/").map(words).join(" › ");

function percent(share) {
  if (share > 0 && share < 0.005) return "<1%";
  if (share < 1 && share >= 0.995) return ">99%";
  return `${Math.round(100 * share)}%`;
}

const spoken = (share) => percent(share).replace("<", "under ").replace(">", "over ").replace("%", " percent");
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MB`;
const counted = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function say(message, busy = false) {
  at("status").textContent = message;
  at("status").classList.toggle("busy", busy);
}

function sayWork() {
  if (state.keyGiven) say("This server asks for an access key.");
  else if (state.request && !state.done) say(READING, true);
  else say(state.done);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

// Talking to the server

async function call(path, { body, signal } = {}) {
  for (let attempt = 0; ; ) {
    const key = state.key;
    const response = await send(path, body, key, signal);
    if (response.status === 401) {
      await otherKey(key, signal);
    } else if (response.status === 429 && attempt < RETRIES) {
      attempt += 1;
      await waitFor(response, attempt, signal);
    } else {
      return read(response);
    }
  }
}

async function send(path, body, key, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    return await fetch(path, { method: body ? "POST" : "GET", body, headers, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The server cannot be reached. Check the connection, then try again.", { again: true });
  }
}

async function waitFor(response, attempt, signal) {
  const asked = Number(response.headers.get("Retry-After") ?? 2);
  const seconds = Number.isFinite(asked) && asked >= 0 ? asked : 2;
  if (seconds > LONGEST_WAIT_S) {
    const time = counted(Math.round(seconds), "second");
    throw new Problem(`The server is busy and asks to wait ${time}.`, { again: true });
  }
  say(`The server is busy; trying again in ${counted(seconds, "second")} (${attempt} of ${RETRIES})…`, true);
  await pause(seconds, signal);
  sayWork();
}

async function read(response) {
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && answer) return answer;
  const status = response.status;
  const said = answer?.error?.message ?? `The server gave no proper answer (status ${status}).`;
  throw new Problem(String(said), { status, again: status === 408 || status === 429 || status >= 500 || response.ok });
}

// The access key

function otherKey(refused, signal) {
  if (state.key !== refused) return Promise.resolve(); // given meanwhile, for another request
  state.keyGiven ??= new Promise((resolve) => askForKey(refused !== "", resolve));
  sayWork();
  return new Promise((resolve, reject) => {
    state.keyGiven.then(resolve);
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

function askForKey(wrong, resolve) {
  at("key-error").textContent = wrong ? "This key was not accepted." : "";
  at("key").toggleAttribute("aria-invalid", wrong);
  at("access").hidden = false;
  at("key").value = "";
  at("key").focus();
  at("key-form").onsubmit = (event) => {
    event.preventDefault();
    const key = at("key").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      at("key-error").textContent = "A key has letters, digits and signs, and no spaces.";
      return;
    }
    store(key);
    state.keyGiven = null;
    at("key").value = "";
    at("access").hidden = true;
    at("file").focus(); // the field that had it is gone
    sayWork();
    resolve();
  };
}

// One picture

async function take(file) {
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  state.picture = file;
  clear();
  try {
    sayWork();
    await learned();
    if (request.signal.aborted) return;
    checkBytes(file);
    checkPixels(await preview(file, request.signal));
    await ask(file, request.signal);
  } catch (error) {
    if (!request.signal.aborted) report(error);
  } finally {
    if (state.request === request) state.request = null;
  }
}

// Both questions at once; each answer is shown when it comes, unless another picture was taken meanwhile.
async function ask(file, signal) {
  if (signal.aborted) return;
  const classifies = state.info?.model.classes.length !== 0;
  const searched = state.info?.index !== null ? question("v1/search?k=10&labelled=true", file, signal) : null;
  const shown = searched?.then(showHits, hitsFailed);
  if (classifies) showAnswer(await question("v1/classify", file, signal));
  else if (searched) showUnclassified(await searched);
  else throw new Problem("This server can do nothing: its model has no classes, and there is no index.");
  reveal();
  await shown;
  if (!signal.aborted) say(state.done); // again, where the search had to wait and said so
}

// The answer, unless the picture is no longer wanted: then nothing ever comes.
async function question(path, file, signal) {
  const body = new FormData();
  body.append("image", file, "image"); // a file's own name may be a patient's
  try {
    const answer = await call(path, { body, signal });
    if (!signal.aborted) return answer;
  } catch (error) {
    if (!signal.aborted) throw error;
  }
  return new Promise(() => {});
}

function checkBytes(file) {
  const most = state.info?.limits?.max_body_bytes;
  if (file.size === 0) throw new Problem("This file is empty.");
  if (most && file.size + 1024 > most) {
    throw new Problem(`This file has ${megabytes(file.size)}; the server takes at most ${megabytes(most)}.`);
  }
}

function checkPixels(size) {
  const most = state.info?.limits?.max_pixels;
  if (size && most && size.width * size.height > most) {
    const millions = (pixels) => (pixels / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
    throw new Problem(
      `This picture has ${size.width} × ${size.height} = ${millions(size.width * size.height)} million pixels; ` +
        `the server takes at most ${millions(most)} million. Reduce it first.`,
    );
  }
}

// The picture stands beside the result; resolves to its size, or to null where the browser cannot show it.
function preview(file, signal) {
  if (state.address) URL.revokeObjectURL(state.address);
  state.address = URL.createObjectURL(file);
  at("result").hidden = false;
  at("file-name").textContent = file.name;
  const picture = at("preview");
  return new Promise((resolve) => {
    const done = (size) => {
      if (signal.aborted) return resolve(null);
      picture.hidden = size === null;
      at("no-preview").hidden = size !== null;
      resolve(size);
    };
    picture.onload = () => done({ width: picture.naturalWidth, height: picture.naturalHeight });
    picture.onerror = () => done(null);
    picture.alt = `Preview of ${file.name}`;
    picture.src = state.address;
  });
}

function clear() {
  for (const id of ["answer", "domain", "hits", "problem"]) at(id).replaceChildren();
  at("cases-summary").textContent = "";
  for (const id of ["result", "cases", "again-row", "preview", "no-preview"]) at(id).hidden = true;
  at("result").classList.remove("muted");
  state.done = "";
}

function report(error) {
  const known = error instanceof Problem;
  const message = known ? error.message : "This page could not show the answer.";
  if (!known) console.error(error);
  say("");
  at("problem").replaceChildren(element("p", { className: "error", text: message }));
  at("again-row").hidden = !(known && error.again);
  if (at("answer").childElementCount === 0) at("result").hidden = true;
}

function reveal() {
  const top = at("result-heading").getBoundingClientRect().top;
  if (top > 0.6 * innerHeight) at("result").scrollIntoView({ block: "start" });
}

// What the server said

function showAnswer(answer) {
  const best = answer.classes[0];
  const known = answer.in_domain?.answer !== false;
  showDomain(answer.in_domain);
  at("answer").replaceChildren(
    element("p", { className: "likeliest" }, [
      known ? "Likeliest: " : "Forced to choose among the classes it knows, the model says: ",
      element("strong", { text: `${pathOf(best.label)}, ${percent(best.probability)}` }),
    ]),
    tree(answer.tree.children, best.label, answer.several, "tree"),
    element("p", {
      className: "explained",
      text: `${explanation(known)}${answer.several ? SEVERAL : ""}${typicality(answer.in_domain)}`,
    }),
  );
  const result = `likeliest class ${leaf(best.label)}, ${spoken(best.probability)}`;
  state.done = known ? `Done: ${result}.` : `Done, but nothing like this was in training: ${result}.`;
  say(state.done);
}

function showUnclassified({ hits, in_domain: domain }) {
  showDomain(domain);
  at("answer").replaceChildren(element("p", { text: "This model names no classes; see the nearest cases." }));
  state.done = `Done: ${counted(hits.length, "nearest case")}.`;
  say(state.done);
}

function explanation(known) {
  return known
    ? "The bars are calibrated probabilities: of many pictures like those of the training given 60%, about 60 in 100 " +
        "are of that class. They can be wrong for this one."
    : "These figures were calibrated on other kinds of pictures and mean little for this one.";
}

const SEVERAL =
  " Each class is judged by itself, as a picture may be of several: the bars have no sum, and a group of classes " +
  "has the bar of its likeliest.";

function typicality(domain) {
  if (typeof domain?.typicality !== "number") return "";
  return ` Typicality ${percent(domain.typicality)}: that share of known pictures lies at least as far off.`;
}

function showDomain(domain) {
  const known = domain?.answer;
  at("result").classList.toggle("muted", known === false);
  const message = domain?.message ? [element("p", { text: domain.message })] : [];
  if (known === false) {
    const heading = element("h3", { text: "Nothing like this was in training" });
    at("domain").replaceChildren(element("div", { className: "warning", role: "alert" }, [heading, ...message]));
  } else if (known === true) {
    at("domain").replaceChildren();
  } else {
    const text = "The model cannot tell whether pictures like this one were in its training.";
    at("domain").replaceChildren(element("div", { className: "remark" }, [element("div", { text }), ...message]));
  }
}

function tree(children, best, several, className) {
  const sorted = [...children].sort((a, b) => b.probability - a.probability);
  const items = sorted.map((node) => branch(node, best, several));
  const list = element("ul", className ? { className } : {}, items.slice(0, SIBLINGS_SHOWN));
  if (items.length > SIBLINGS_SHOWN) list.append(rest(sorted.slice(SIBLINGS_SHOWN), items.slice(SIBLINGS_SHOWN), several));
  return list;
}

function branch(node, best, several) {
  const share = Math.min(1, Math.max(0, Number(node.probability)));
  const fill = element("span", { className: "fill" });
  fill.style.width = `${100 * share}%`;
  const row = element("div", { className: "class" }, [
    element("span", { text: leaf(node.label) }),
    element("span", { className: "bar", "aria-hidden": "true" }, [fill]), // the percentage says it
    element("span", { className: "percent", text: percent(share) }),
  ]);
  const item = element("li", node.label === best ? { className: "top" } : {}, [row]);
  if (node.children?.length) item.append(tree(node.children, best, several));
  return item;
}

function rest(nodes, items, several) {
  const share = nodes.reduce((sum, node) => sum + node.probability, 0);
  const said = several ? `each at most ${percent(nodes[0].probability)}` : `together ${percent(share)}`;
  const summary = element("summary", { text: `${nodes.length} more, ${said}` });
  return element("li", {}, [element("details", {}, [summary, element("ul", {}, items)])]);
}

function showHits(answer) {
  const counts = new Map();
  for (const hit of answer.hits) counts.set(hit.label, (counts.get(hit.label) ?? 0) + 1);
  const named = [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) => `${label ? leaf(label) : "no label"} ${n}`);
  const total = counted(answer.hits.length, "nearest case");
  at("cases-summary").textContent = answer.hits.length ? `Of the ${total}: ${named.join(", ")}.` : "None was found.";
  at("hits").replaceChildren(...answer.hits.map(hitOf));
  at("cases").hidden = false;
}

function hitOf(hit) {
  const name = hit.label ? leaf(hit.label) : "no label";
  const parents = String(hit.label ?? "").split("/").slice(0, -1).map(words).join(" › ");
  const picture = PICTURE.test(hit.thumbnail ?? "")
    ? element("img", { src: hit.thumbnail, alt: `Known case: ${name}`, width: 136, height: 136 })
    : element("span", { className: "missing faint", text: "no picture" });
  const caption = element("figcaption", {}, [element("strong", { text: name })]);
  if (parents) caption.append(element("span", { className: "path", text: parents }));
  caption.append(element("span", { text: `similarity ${Number(hit.score).toFixed(2)}` }));
  if (hit.group) caption.append(element("span", { className: "path", text: `group ${hit.group}` }));
  return element("li", {}, [element("figure", {}, [picture, caption])]);
}

function hitsFailed(error) {
  at("hits").replaceChildren();
  at("cases").hidden = error.status === 404 || error.status === 409; // served without an index
  at("cases-summary").textContent = `The nearest cases could not be fetched: ${error.message}`;
}

// About the model

async function learn() {
  try {
    state.info = await call("v1/model");
    showInfo(state.info);
  } catch (error) {
    state.learning = null; // the next picture asks again
    if (!state.picture) report(error);
  }
}

function learned() {
  state.learning ??= learn();
  return state.learning;
}

function showInfo({ model, index, limits }) {
  at("model-line").textContent = `Model ${model.name}, ${counted(model.classes.length, "class", "classes")}`;
  document.title = `${model.name} – Rayograph`;
  const millions = (limits.max_pixels / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
  at("limits").textContent = `, at most ${megabytes(limits.max_body_bytes)} and ${millions} million pixels`;
  const facts = [
    ["Model", model.name],
    ["Weights (sha256)", model.sha256],
    ["Model card (sha256)", model.card_sha256],
    ["Looks at", `${model.image_size} pixels`],
  ];
  for (const [name, value] of Object.entries(model.metrics ?? {})) {
    if (typeof value === "number") facts.push([METRICS[name] ?? capital(words(name)), value.toFixed(3)]);
  }
  if (index) facts.push(["Searched cases", index.vectors.toLocaleString("en")]);
  const pair = ([name, value]) => [element("dt", { text: name }), element("dd", { text: value })];
  at("facts").replaceChildren(...facts.flatMap(pair));
  at("classes").replaceChildren(...model.classes.map((label) => element("li", { text: pathOf(label) })));
  at("known").hidden = model.classes.length === 0;
  at("about").hidden = false;
}

// Choose, drop, paste

function put(files) {
  if (files.length === 0) return;
  const carrier = new DataTransfer();
  carrier.items.add(files[0]);
  at("file").files = carrier.files; // the field shows the name, however the picture came
  take(files[0]);
}

function dropped(event) {
  event.preventDefault();
  at("drop").classList.remove("over");
  const files = [...event.dataTransfer.files];
  if (files.length === 0) say("That was no file. Drop an image file.");
  put(files);
}

function dragged(event) {
  event.preventDefault();
  event.dataTransfer.dropEffect = "copy";
  at("drop").classList.add("over");
}

function pasted(event) {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    put(files);
  } else if (!(event.target instanceof HTMLInputElement && event.target.type === "password")) {
    say("The clipboard holds no picture.");
  }
}

at("file").addEventListener("change", (event) => event.target.files.length && take(event.target.files[0]));
at("again").addEventListener("click", () => {
  at("file").focus(); // the button goes
  clear();
  if (state.picture) take(state.picture);
  else learned();
});
document.addEventListener("paste", pasted);
document.addEventListener("dragover", dragged);
document.addEventListener("dragleave", (event) => event.relatedTarget === null && at("drop").classList.remove("over"));
document.addEventListener("drop", dropped);
learned();
