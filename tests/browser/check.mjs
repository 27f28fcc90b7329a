// The pages of `steprule report` in a real browser: node check.mjs FOLDER_OF_PAGES CHROMIUM
import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [folder, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const pages = readdirSync(folder).filter((name) => name.endsWith(".html"));
let checks = 0;

// Opens a page, runs a check on it, and sees that nothing was requested and nothing went wrong.
async function on(name, options, check) {
  const context = await browser.newContext({ offline: true, ...options });
  context.setDefaultTimeout(10_000);
  const page = await context.newPage();
  const wrong = [];
  const address = pathToFileURL(resolve(join(folder, name))).href;
  page.on("console", (message) => wrong.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => wrong.push(`error: ${error.message}`));
  page.on("dialog", (dialog) => (wrong.push(`dialog: ${dialog.message()}`), dialog.dismiss()));
  page.on("request", (request) => request.url() === address || request.url().startsWith("data:") || wrong.push(request.url()));
  await page.goto(address);
  try {
    await check(page);
    assert.deepEqual(wrong, []);
  } catch (error) {
    error.message = `${name} ${JSON.stringify(options)}: ${error.message}`;
    throw error;
  }
  await context.close();
  checks += 1;
}

const wide = { viewport: { width: 1400, height: 900 } };
const phone = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };
const tip = (page) => page.locator(".tip:not([hidden])");
const shown = (page, selector) => page.locator(selector).filter({ visible: true }).count();
const paper = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);

for (const name of pages) {
  for (const options of [wide, phone, { ...wide, javaScriptEnabled: false }]) {
    await on(name, options, async (page) => {
      if (options.javaScriptEnabled !== false) {
        const [needed, there] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.ok(needed <= there, `${needed} wide on a screen of ${there}`);
        await page.evaluate(() => document.querySelectorAll("details").forEach((x) => (x.open = true)));
        const opened = await page.evaluate(() => document.documentElement.scrollWidth);
        assert.ok(opened <= there, `${opened} wide with its tables open`);
      }
      assert.ok((await shown(page, ".chart")) > 0);
      assert.ok((await shown(page, "h1")) === 1);
    });
  }
}

await on("race.html", { ...wide, colorScheme: "dark" }, async (page) => assert.equal(await paper(page), "rgb(20, 23, 28)"));
await on("race.html", { ...wide, colorScheme: "light" }, async (page) => assert.equal(await paper(page), "rgb(255, 255, 255)"));

await on("race.html", wide, async (page) => {
  assert.match(await page.locator("h1").textContent(), /^<\/script><script>alert\(1\)<\/script>: 4 optimizers/);
  // The pointer.
  const point = page.locator(".v-steps.v-log .n0 .p").nth(3);
  await point.hover({ force: true });
  assert.match(await tip(page).textContent(), /^AdamW, step 220, 0.792 s: /);
  const [box, near] = [await tip(page).boundingBox(), await point.boundingBox()];
  assert.ok(Math.abs(box.x - near.x) < 40 && Math.abs(box.y - near.y) < 40, "the tip is beside its point");
  await page.mouse.move(5, 5);
  assert.equal(await tip(page).count(), 0);
  // The keyboard.
  await page.locator(".v-steps.v-log").first().focus();
  const said = () => page.evaluate(() => document.activeElement.getAttribute("aria-label"));
  for (const [key, expected] of [
    ["ArrowRight", /^AdamW, step 55,/],
    ["ArrowRight", /^AdamW, step 110,/],
    ["ArrowDown", /^(Signum|Lion|torch.optim.SGD), step 110,/],
    ["ArrowUp", /^AdamW, step 110,/],
    ["ArrowLeft", /^AdamW, step 55,/],
    ["End", /, step 550,/],
    ["Home", /^AdamW, step 55,/],
  ]) {
    await page.keyboard.press(key);
    assert.match(await said(), expected, key);
    assert.equal(await tip(page).textContent(), await said());
  }
  await page.keyboard.press("Escape");
  assert.equal(await tip(page).count(), 0);
});

await on("race.html", wide, async (page) => {
  const choose = (label) => page.getByLabel(label, { exact: true });
  const lines = () => shown(page, ".v-steps .n1 .line, .v-seconds .n1 .line");
  assert.equal(await lines(), 1);
  await choose("Lion").uncheck();
  assert.equal(await lines(), 0);
  await choose("Lion").check();
  assert.equal(await shown(page, ".v-seconds"), 0);
  await choose("seconds instead of steps").check();
  assert.deepEqual([await shown(page, ".v-seconds"), await shown(page, ".v-steps")], [1, 0]);
  const logarithmic = await shown(page, ".v-log");
  await choose("linear instead of logarithmic").check();
  assert.deepEqual([await shown(page, ".v-linear"), await shown(page, ".v-log")], [logarithmic, 0]);
  assert.equal(await shown(page, ".v-seconds .seed"), 0);
  await choose("every seed").check();
  assert.equal(await shown(page, ".v-seconds.v-linear .seed"), 20);
});

await on("race.html", { ...wide, javaScriptEnabled: false }, async (page) => {
  await page.getByLabel("seconds instead of steps").check();
  assert.deepEqual([await shown(page, ".v-seconds"), await shown(page, ".v-steps")], [1, 0]);
  assert.ok(await page.getByText("AdamW ended lowest; Signum").isVisible());
});

await on("race.html", wide, async (page) => {
  await page.locator("figure summary").first().click();
  const [download] = await Promise.all([page.waitForEvent("download"), page.locator("figure button").first().click()]);
  assert.equal(download.suggestedFilename(), "Training.csv");
  await page.getByRole("button", { name: "Copy" }).first().click();
  assert.equal(await page.getByRole("button", { name: "Copied" }).count(), 1);
});

await on("race.html", wide, async (page) => {
  const pdf = await page.pdf({ format: "A4" });
  assert.equal(pdf.subarray(0, 5).toString(), "%PDF-");
  await page.emulateMedia({ media: "print", colorScheme: "dark" });
  assert.equal(await paper(page), "rgb(255, 255, 255)");
  assert.equal(await shown(page, ".controls"), 0);
  await page.setViewportSize({ width: 700, height: 1000 }); // about what A4 has between its margins
  const [table, main] = await page.evaluate(() => ["table.cards", "main"].map((x) => document.querySelector(x).getBoundingClientRect().right));
  assert.ok(table <= main, "the main table is on the paper");
});

await on("race.html", phone, async (page) => {
  await page.locator(".v-steps.v-log .n0 .p").last().tap({ force: true });
  const box = await tip(page).boundingBox();
  assert.ok(box.x >= 0 && box.x + box.width <= 390, "the tip is on the screen");
  // Letters of charts are as large as a caption.
  const letters = await page.locator(".chart text").first().evaluate((text) => text.getBoundingClientRect().height);
  assert.ok(letters >= 10, `${letters} pixels`);
});

await on("race-zh.html", wide, async (page) => {
  assert.equal(await page.evaluate(() => document.documentElement.lang), "zh");
  assert.ok(await page.getByText("学习率").first().isVisible());
});

await on("bench.html", wide, async (page) => {
  await page.locator(".chart .bar").first().hover({ force: true });
  assert.match(await tip(page).textContent(), /^AdamW, steprule, default: 61.0 ms, 1.04 ×$/);
});

await browser.close();
console.log(`${checks} checks of ${pages.length} pages`);
