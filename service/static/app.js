// The web page: sends images to POST /classify and shows what came back. Talks to nothing else than this service.

const REQUESTS_AT_ONCE = 4; // of one file each: limits on a request then meet single files, and first answers come early
const RETRIES = 5; // of a file that is refused for a while: the queue is full, or no worker is ready, or nobody answers
const RETRY_S = 1; // where the service has not said after how long
const MODEL_S = 5; // for which it is waited until the service says what it serves
const REASONS = {
  confident: "the score fell below its threshold",
  last: "every expert was needed",
  budget: "stopped at the limit on experts",
};
const SCORES = {
  router: "the router's score",
  confidence: "one minus the highest probability",
  margin: "one minus the lead of the most probable class over the next",
  agreement: "the share of the experts so far that disagree with their mean (1 after the first)",
};
const ORDINALS = ["first", "second", "third", "fourth", "fifth"];

const byId = (id) => document.getElementById(id);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}\u00a0%`;
const milliseconds = (ms) => `${ms.toFixed(ms < 10 ? 1 : 0)}\u00a0ms`;
const seconds = (s) => new Promise((next) => setTimeout(next, 1000 * s));
const expertColour = (number) => `var(--expert-${Math.min(number, 6)})`;

/** An element with properties and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") Object.assign(element.style, value);
    else if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const session = new Map(); // experts used -> images
let sending = new AbortController(); // of all that was chosen since the last "Clear"
let model = null; // as GET /model describes it
let cards = 0;

// The model ---------------------------------------------------------------------------------------------------------

async function showModel() {
  while (!model) {
    try {
      await askForModel();
    } catch (error) {
      byId("model").textContent = `No model: ${error.message}`;
      byId("model").className = "bad";
      await seconds(RETRY_S); // the service may be starting
    }
  }
}

/** Ask which model is served, and describe it where it is another one than before, or one that is set otherwise. */
async function askForModel() {
  const answer = await fetch("model", { signal: AbortSignal.timeout(1000 * MODEL_S) });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error?.message ?? `the service answered ${answer.status}`);
  if (JSON.stringify(told) === JSON.stringify(model)) return;
  model = told;
  describeModel();
}

function describeModel() {
  byId("model").className = "";
  byId("model").textContent =
    `${model.name} ${model.version}: ${model.classes.length} classes, ${model.experts} ${model.experts === 1 ? "expert" : "experts"}`;
  byId("max-experts").options[0].textContent = model.max_experts < model.experts ? model.max_experts : "all";
  offer("max-experts", Array.from({ length: model.max_experts - 1 }, (_, i) => i + 1));
  byId("mode").disabled = !model.thresholds.length; // one expert: nothing to decide
  offer("mode", Object.keys(model.modes).filter((mode) => mode !== "balanced")); // that is the model's own
  if (!model.thresholds.length) byId("mode").value = "";
  if (byId("mode").value !== "own") byId("threshold").value = model.thresholds[0] ?? 0.5;
  showThresholds();
}

/** Put values behind a list's first option, in place of those of the model before; what was chosen stays if it can. */
function offer(id, values) {
  const list = byId(id);
  const chosen = list.value;
  list.querySelectorAll("[data-offered]").forEach((option) => option.remove());
  list.options[0].after(...values.map((value) => make("option", { value, textContent: value, "data-offered": "" })));
  list.value = chosen;
  if (list.selectedIndex < 0) list.selectedIndex = 0;
}

/** Which images the next expert sees, and how many experts calibration measured so on held-out images. */
function showThresholds() {
  if (!model) return;
  const mode = byId("mode").value;
  const own = Number(byId("threshold").value);
  byId("threshold").hidden = mode !== "own";
  byId("threshold-value").textContent = mode === "own" ? own.toFixed(2) : "";
  const limit = Number(byId("max-experts").value) || model.max_experts;
  const chosen = mode === "own" ? model.thresholds.map(() => own) : (model.modes[mode] ?? model.thresholds);
  const calibrated = model.calibration.points.find(
    ({ rule, thresholds }) => limit === model.experts && rule === model.rule && `${thresholds}` === `${chosen}`,
  );
  byId("threshold-says").textContent = inWords(chosen.slice(0, limit - 1), calibrated);
}

function inWords(thresholds, calibrated) {
  if (!thresholds.length) return "Only one expert runs: there is nothing to decide.";
  const fixed = model.rule === "depth"; // its score is always 0.5
  const stop = thresholds.findIndex((threshold) => threshold > (fixed ? 0.5 : 0));
  if (fixed && stop === 0) return "Only the first expert runs, on every image.";
  if (fixed || stop < 0) return `${stop < 0 ? thresholds.length + 1 : stop + 1} experts run on every image.`;
  const values = thresholds.map((threshold) => threshold.toFixed(2));
  const places = values.map((value, router) => `${value} after the ${ORDINALS[router] ?? `${router + 1}th`}`);
  const least = new Set(values).size === 1 ? values[0] : new Intl.ListFormat("en-GB").format(places);
  const cost = calibrated ? `: ${calibrated.mean_experts.toFixed(2)} experts per image on held-out images` : "";
  return `The ${values.length === 1 ? "second" : "next"} expert runs where ${SCORES[model.rule]} is at least ${least}${cost}.`;
}

// Sending -----------------------------------------------------------------------------------------------------------

async function classify(files) {
  const images = [...files];
  if (!images.length) return;
  const { signal } = sending;
  const waiting = images.map((file) => ({ file, card: newCard(file) }));
  byId("results").prepend(...waiting.map(({ card }) => card));
  if (model) await askForModel().catch(() => {}); // the service may have been restarted; if it is gone, the cards say so
  const options = new URLSearchParams();
  if (byId("max-experts").value) options.set("max_experts", byId("max-experts").value);
  const mode = byId("mode").value;
  if (mode === "own") options.set("threshold", byId("threshold").value);
  else if (mode) options.set("mode", mode);

  const sendNext = async () => {
    while (waiting.length && !signal.aborted) await send(waiting.shift(), options, signal);
  };
  await Promise.all(Array.from({ length: REQUESTS_AT_ONCE }, sendNext));
}

async function send({ file, card }, options, signal) {
  const answer = await answerFor(file, options, signal);
  if (signal.aborted) return;
  const result = answer.results?.[0] ?? { error: answer.error };
  card.classList.remove("waiting");
  card.append(...(result.error ? showError(card, result.error, answer.request_id) : showResult(card, result)));
  showSession();
}

/** What the service says of a file, or why it could not say anything. */
async function answerFor(file, options, signal) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return { error: { code: "not readable", message: "a folder, or a file that is gone; choose image files" } };
  }
  const body = new FormData();
  body.append("file", file, file.name);
  try {
    const response = await ask(`classify?${options}`, { method: "POST", body, signal });
    return await response.json();
  } catch (error) {
    return { error: { code: "no answer", message: `${error.message}. Is the service running?` } };
  }
}

/** A response; where there is none, or one that says so, after some more tries. */
async function ask(url, request, retries = RETRIES) {
  let wait = RETRY_S;
  try {
    const response = await fetch(url, request);
    if (!response.headers.has("retry-after") || !retries) return response;
    wait = Number(response.headers.get("retry-after"));
  } catch (error) {
    if (request.signal.aborted || !retries) throw error;
  }
  await seconds(wait);
  return ask(url, request, retries - 1);
}

// One image ---------------------------------------------------------------------------------------------------------

function newCard(file) {
  const id = `card-${++cards}`;
  const picture = make("img", { className: "picture", alt: "" });
  const url = URL.createObjectURL(file);
  const done = () => URL.revokeObjectURL(url);
  picture.addEventListener("load", () => {
    picture.classList.toggle("small", picture.naturalWidth < 100);
    done();
  });
  picture.addEventListener("error", () => {
    // Not an image, or of a format that the service reads and the browser does not show.
    picture.replaceWith(make("div", { className: "picture", textContent: file.name.split(".").pop() }));
    done();
  });
  picture.src = url;
  const title = make("h2", { id, title: file.name, textContent: file.name });
  const top = make("div", { className: "top" }, picture, make("div", { className: "what" }, title));
  return make("article", { className: "waiting", "aria-labelledby": id }, top);
}

function showError(card, error, requestId) {
  const name = card.querySelector("h2").textContent;
  byId("news").textContent = `${name}: ${error.message}`;
  const request = requestId ? make("span", { textContent: ` (request ${requestId})` }) : null;
  return [make("p", { className: "error" }, make("b", { textContent: error.code }), `: ${error.message}`, request)];
}

function showResult(card, result) {
  const [best] = result.predictions;
  session.set(result.experts_used, (session.get(result.experts_used) ?? 0) + 1);
  const name = card.querySelector("h2").textContent;
  const experts = `${result.experts_used} of ${result.experts_total} experts`;
  byId("news").textContent = `${name}: ${best.label}, ${percent(best.probability)}, ${experts}`;

  const dots = make("p", { className: "dots" });
  for (let n = 1; n <= result.experts_total; n++) {
    const filled = n <= result.experts_used ? expertColour(result.experts_used) : "";
    dots.append(make("span", { className: "dot", style: { background: filled, borderColor: filled } }));
  }
  dots.append(make("span", { textContent: experts }));
  card.querySelector(".what").append(
    make("p", { className: "answer", textContent: best.label }),
    make("p", { className: `split ${best.split}`, textContent: trainedOn(best) }),
    dots,
  );
  return [classTable(result), routerTable(result), timeBar(result.latency_ms)];
}

/** A class's split, with the number of its training images where the model is known. */
function trainedOn({ index, split }) {
  const trained = model?.classes[index]?.training_images;
  return trained === undefined ? split : `${split}: ${trained} training ${trained === 1 ? "image" : "images"}`;
}

function classTable(result) {
  const rows = result.predictions.map((prediction) => {
    const { label, probability } = prediction;
    return make(
      "tr",
      { title: trainedOn(prediction) },
      make("th", { scope: "row", textContent: label }),
      make("td", {}, make("div", { className: "probability" }, make("span", { style: { width: `${100 * probability}%` } }))),
      make("td", { textContent: percent(probability, 1) }),
    );
  });
  return make("table", { className: "classes" }, make("caption", { textContent: "Most probable classes" }), ...rows);
}

function routerTable(result) {
  const reason = REASONS[result.exit_reason] ?? result.exit_reason;
  if (!result.router_scores.length) return make("p", { className: "label", textContent: `Stopped: ${reason}. There was nothing to decide.` });
  const rows = result.router_scores.map((score, router) => {
    const threshold = result.thresholds[router];
    const wentOn = router + 1 < result.experts_used; // a budget stops above the threshold, min_confidence goes on below
    const digits = [2, 3, 4, 5].find((n) => score.toFixed(n) !== threshold.toFixed(n)) ?? 2; // until they differ
    const comparison = `${score.toFixed(digits)} ${score >= threshold ? "≥" : "<"} ${threshold.toFixed(digits)}`;
    return make(
      "tr",
      {},
      make("th", { scope: "row", textContent: `after expert ${router + 1}` }),
      make(
        "td",
        {},
        make(
          "div",
          { className: "score" },
          make("span", { style: { width: `${100 * score}%` } }),
          make("i", { style: { left: `${100 * threshold}%` } }),
        ),
      ),
      make("td", { textContent: `${comparison} ${wentOn ? "next" : "stop"}` }),
    );
  });
  return make("table", { className: "routers" }, make("caption", { textContent: `Scores: ${reason}` }), ...rows);
}

function timeBar(latency) {
  const steps = [
    ["decode", latency.decode, "var(--decode)"],
    ["queue", latency.queue, "var(--queue)"],
    ["trunk", latency.trunk, "var(--trunk)"],
    ...latency.experts.map((ms, i) => [`expert ${i + 1}`, ms, expertColour(i + 1)]),
  ];
  const rest = latency.total - steps.reduce((sum, [, ms]) => sum + ms, 0);
  if (rest > 0) steps.push(["other", rest, "var(--rest)"]);
  const whole = steps.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  const bar = make("div", { className: "bar", "aria-hidden": "true" });
  const list = make("ul", { className: "steps" });
  for (const [name, ms, background] of steps) {
    bar.append(make("span", { style: { width: `${(100 * ms) / whole}%`, background } }));
    list.append(make("li", {}, make("i", { style: { background } }), `${name} ${milliseconds(ms)}`));
  }
  return make("div", {}, make("p", { className: "label", textContent: `Time: ${milliseconds(latency.total)}` }), bar, list);
}

// This session ------------------------------------------------------------------------------------------------------

function showSession() {
  const images = [...session.values()].reduce((sum, n) => sum + n, 0);
  byId("session").hidden = false;
  const shares = [...session].sort(([a], [b]) => a - b).map(([experts, n]) => [experts, n / images]);
  const words = shares.map(([experts, share]) => `${experts}\u00a0${experts === 1 ? "expert" : "experts"} ${percent(share)}`);
  byId("shares").textContent = `${images} ${images === 1 ? "image" : "images"} this session: ${words.join(" · ") || "no answers yet"}`;
  byId("shares-bar").replaceChildren(
    ...shares.map(([experts, share]) =>
      make("span", { style: { width: `${100 * share}%`, background: expertColour(experts) } }),
    ),
  );
}

byId("clear").addEventListener("click", () => {
  sending.abort();
  sending = new AbortController();
  session.clear();
  byId("news").textContent = "";
  byId("results").replaceChildren();
  byId("session").hidden = true;
  byId("files").focus();
});

// Choosing, dropping, pasting ---------------------------------------------------------------------------------------

byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("files").addEventListener("change", ({ target }) => {
  classify(target.files);
  target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  classify(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => classify(event.clipboardData.files));
byId("max-experts").addEventListener("change", showThresholds);
byId("mode").addEventListener("change", showThresholds);
byId("threshold").addEventListener("input", showThresholds);

showModel();
