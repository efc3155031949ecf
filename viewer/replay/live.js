// Playing on from any frame, by the model or by your hand, and playing against the model. Needs the rules in game.js.
"use strict";

const HAND = { arrowleft: 1, arrowright: 2 }; // the actions of the keys with which you take over
let hand = null; // your action, as long as you hold a key or a button, and for one step at least
let acted = false; // whether it has been played
let released = false; // whether you have let go

function hold(action) {
  if (action !== hand) acted = false;
  hand = action;
  released = false;
}

function release() {
  released = true;
  if (acted || !(match || playing)) hand = null;
}

// Return the action of your hand, which is then played.
function actByHand() {
  const action = hand;
  acted = true;
  if (released) hand = null;
  return action;
}

// Write how a frame was played on as a digit: the action, and whether you chose it, against the model's advice or not.
const moveAsDigit = ({ action, hand, best }) => action + actions.length * (hand ? (best === action ? 1 : 2) : 0);

// Return a frame, in which the move of a digit is made, and the frame after it. Return null if that is no move there.
function playedOn(frame, digit) {
  if (!frame || digit >= 3 * actions.length || isOver(frame.state)) return null;
  const action = digit % actions.length;
  const advice = Math.floor(digit / actions.length);
  const move = { action, hand: advice > 0, best: advice === 2 ? null : action, by: reader() };
  return [{ ...frame, ...move }, frameOf(advance(frame.state, action))];
}

function playOnFrom(i) {
  branchOff(i, { ...line[i], action: null, hand: false }, i + 1);
}

// Play on instead of replaying, because other heads or another temperature would not do what is recorded.
function leaveRecording() {
  const { action } = line[shown.frame];
  if (action !== null && action !== GAME_OVER) playOnFrom(shown.frame);
}

const isAsRecorded = () => silent.size === 0 && Number(element("temperature").value) === 0;

// Play one step at the end of the line, or instead of what follows there if you have taken over. Returns whether there
// was one to play.
function playOneStep() {
  const frame = line[shown.frame];
  if (frame.action === GAME_OVER || (hand === null && frame.action !== null)) return false;
  if (frame.action !== null) playOnFrom(shown.frame);
  else if (frame.edited) branchOff(shown.frame, frame, branch); // so that undo goes back to the edit
  const { probabilities, logits, value } = read();
  const best = largest(probabilities);
  const byHand = hand !== null;
  const action = byHand ? actByHand() : drawn(logits);
  line[shown.frame] = { ...line[shown.frame], action, best, value, hand: byHand, by: reader() };
  line.push(frameOf(advance(frame.state, action)));
  shown.frame += 1;
  return true;
}

// Choose an action: the most probable one at temperature 0, otherwise at random.
function drawn(logits) {
  const temperature = Number(element("temperature").value);
  if (temperature === 0) return largest([...logits]);
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
  let left = Math.random() * powers.reduce((a, b) => a + b);
  return Math.max(0, powers.findIndex((power) => (left -= power) < 0));
}

// Say how often you did what the model would have done.
function showAgreement() {
  const yours = line.filter(({ hand, action }) => hand && action !== null);
  const agreed = yours.filter(({ action, best }) => action === best).length;
  const last = line[shown.frame - 1];
  const move = last?.hand && last.best !== null
    ? `You: ${actions[last.action]}, the GPT would: ${actions[last.best]}. ` : "";
  element("agreement").textContent = yours.length ? `${move}You agree in ${agreed} of ${yours.length} moves.` : "";
}

function beginLive() {
  keys.o = () => {
    if (playing) pause();
    if (line[shown.frame].action === GAME_OVER) return;
    leaveRecording();
    play();
  };
  keys.v = () => (match ? leaveMatch() : startMatch());
  element("on").onclick = keys.o;
  element("versus").onclick = element("again").onclick = startMatch;
  element("leave").onclick = leaveMatch;
  element("temperature").oninput = () => {
    nameTemperature();
    if (playing) leaveRecording();
  };
  nameTemperature();
  for (const button of document.querySelectorAll("[data-hand]")) {
    button.onpointerdown = (event) => {
      button.setPointerCapture(event.pointerId);
      if (!match && !playing) play();
      hold(Number(button.dataset.hand));
    };
    button.onpointerup = button.onpointercancel = release;
  }
  addEventListener("keydown", holdKey, true);
  addEventListener("keyup", (event) => HAND[event.key.toLowerCase()] === hand && release());
  addEventListener("blur", () => (hand = null));
  addEventListener("resize", () => match && fitMatch());
}

function nameTemperature() {
  const temperature = Number(element("temperature").value);
  const name = temperature === 0 ? "0: always its best" : `${temperature}: sampled`;
  element("temperature-name").textContent = name;
  element("temperature").setAttribute("aria-valuetext", name);
}

// While time goes on, the arrow keys are the paddle's, unless a control that needs them has the focus. One that is still
// held after a pause does nothing.
function holdKey(event) {
  if (withModifier(event)) return;
  const key = event.key.toLowerCase();
  if (match) event.stopPropagation(); // the page to which all other keys belong is hidden
  if (match && (key === "escape" || key === "v")) return leaveMatch();
  const stillHeld = event.repeat && hand !== null;
  const needed = own[event.target.type]?.includes(key) || event.target.dataset?.head; // by the control with the focus
  if (!HAND[key] || needed || !(match || playing || stillHeld)) return;
  if (match || playing) hold(HAND[key]);
  event.preventDefault();
  event.stopPropagation();
}

// You against the GPT: the same serves, side by side.

let match = null; // {yours, its, timer, moves, agreed, running, wait}
const PAUSE = 12; // steps for which both games wait after you have lost a ball
const HURRY = 5; // how many times faster the GPT plays once your game is over

function startMatch() {
  if (playing) pause();
  clearInterval(match?.timer);
  const start = newGame(randomServes(), wholeWall());
  match = { yours: start, its: start, moves: 0, agreed: 0, running: false, wait: 0 };
  document.body.classList.add("versus");
  element("match").hidden = false;
  fitMatch();
  drawMatch();
  const begin = "Hold ← or → to begin. The same balls are served to you and to the GPT.";
  element("match-said").textContent = begin;
  match.timer = setInterval(stepMatch, 1000 / 15);
}

function leaveMatch() {
  clearInterval(match.timer);
  match = null;
  document.body.classList.remove("versus");
  element("match").hidden = true;
  redraw();
}

function stepMatch() {
  if (!match.running && hand === null) return;
  if (!match.running) element("match-said").textContent = "";
  match.running = true;
  if (match.wait > 0) return (match.wait -= 1);
  if (isOver(match.yours)) for (let i = 1; i < HURRY; i++) moveIts();
  else moveYours();
  moveIts();
  drawMatch();
  if (isOver(match.yours) && isOver(match.its)) endMatch();
}

function moveYours() {
  const { yours } = match;
  const advice = models[shown.stage].read(pageOf(yours)).probabilities;
  const action = hand === null ? 0 : actByHand();
  match.moves += 1;
  match.agreed += action === largest(advice);
  match.yours = advance(yours, action);
  if (match.yours.lives < yours.lives) match.wait = PAUSE;
  if (isOver(match.yours)) element("match-said").textContent = "Your game is over. The GPT plays on, faster.";
}

function moveIts() {
  const { its } = match;
  if (!isOver(its)) match.its = advance(its, drawn(models[shown.stage].read(pageOf(its)).logits));
}

function endMatch() {
  clearInterval(match.timer);
  const [you, it] = [match.yours.score, match.its.score];
  const winner = you > it ? "You have won" : you < it ? "The GPT has won" : "A draw";
  element("match-said").textContent = `${winner}: ${you} for you, ${it} for the GPT.`;
}

function drawMatch() {
  drawPage(element("your-page"), pageOf(match.yours));
  drawPage(element("its-page"), pageOf(match.its));
  const told = ({ score, lives }) => `${score} · lives ${lives}`;
  element("your-score").textContent = told(match.yours);
  element("its-score").textContent = told(match.its);
  element("match-agreement").textContent = match.moves
    ? `You do what it would have done in ${match.agreed} of ${match.moves} steps.` : "";
}

function fitMatch() {
  for (const side of document.querySelectorAll(".side")) {
    const pre = side.querySelector("pre");
    drawPage(pre, pageOf(match.yours));
    fitInto(pre, side.clientWidth, 18);
  }
}
