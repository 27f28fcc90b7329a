// The built documentation in a real browser, without network: node docs.mjs FOLDER CHROMIUM
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [folder, executablePath] = process.argv.slice(2).map((path) => resolve(path));
const pages = readdirSync(folder, { recursive: true }).filter((name) => name.endsWith(".html"));
const texts = new Map(pages.map((name) => [resolve(folder, name), readFileSync(join(folder, name), "utf8")]));
assert.ok(pages.length > 100, `${pages.length} pages in ${folder}`);

// Every link within the site has a page, and its anchor a place there.
const ids = new Map([...texts].map(([file, text]) => [file, new Set([...text.matchAll(/ id="([^"]*)"/g)].map((x) => x[1]))]));
let links = 0;
for (const [file, text] of texts) {
  for (const [, link] of text.matchAll(/<(?:a|link|script|img)\b[^>]*?\b(?:href|src)="([^"]*)"/g)) {
    if (/^(https?|mailto|data):/.test(link)) continue;
    const [path, anchor] = link.replaceAll("&amp;", "&").split("#");
    const target = path ? resolve(dirname(file), decodeURIComponent(path.split("?")[0])) : file;
    assert.ok(existsSync(target), `${relative(folder, file)} links to ${link}, which is not there`);
    if (anchor) assert.ok(ids.get(target).has(decodeURIComponent(anchor)), `${relative(folder, file)}: no ${link}`);
    links += 1;
  }
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

// Runs a check on pages, and sees that nothing beside the site's own files was requested.
async function on(names, options, check) {
  const context = await browser.newContext({ offline: true, ...options });
  const page = await context.newPage();
  const wrong = [];
  page.on("console", (message) => wrong.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => wrong.push(`error: ${error.message}`));
  page.on("request", (request) => {
    const file = request.url().startsWith("file:") && fileURLToPath(request.url().split(/[?#]/)[0]);
    if (!file || !existsSync(file)) wrong.push(request.url());
  });
  for (const name of names) {
    await page.goto(pathToFileURL(join(folder, name)).href);
    await check(page, name);
    assert.deepEqual(wrong, [], name);
  }
  await context.close();
}

const phone = { viewport: { width: 390, height: 844 } };
const wide = { viewport: { width: 1400, height: 900 } };
const some = ["index", "tutorials/groups", "rules/adabelief", "rules/muon", "numbers"].flatMap((x) => [`${x}.html`, `zh/${x}.html`]);

for (const [options, names] of [[phone, pages], [wide, some]]) {
  await on(names, options, async (page, name) => {
    const [needed, there] = await page.evaluate(() => {
      document.querySelectorAll("article details").forEach((x) => (x.open = true));
      return [document.documentElement.scrollWidth, innerWidth];
    });
    assert.ok(needed <= there, `${name}: ${needed} wide on a screen of ${there}`);
  });
}

// Without scripts the formulas are drawn, with MathML beside them, and the listings open.
await on(["rules/adabelief.html", "zh/rules/adabelief.html"], { ...wide, javaScriptEnabled: false }, async (page, name) => {
  assert.ok((await page.locator(".formula .katex-html").first().boundingBox()).height > 10, name);
  assert.ok((await page.locator(".formula math").count()) >= 8, name);
  await page.locator("summary").first().click();
  assert.ok(await page.getByText("addcmul").first().isVisible(), name);
});
await on(["rules/muon.html"], { ...wide, colorScheme: "dark" }, async (page) => {
  const colour = (selector, property) =>
    page.evaluate(([s, p]) => getComputedStyle(document.querySelector(s))[p], [selector, property]);
  assert.notEqual(await colour("body", "backgroundColor"), "rgb(255, 255, 255)");
  assert.notEqual(await colour("svg.chart text", "fill"), "rgb(0, 0, 0)");
});
// The switch of languages leads to the same page and back.
await on(["tutorials/groups.html"], wide, async (page) => {
  for (const language of ["zh-CN", "en"]) {
    await page.locator(".language a").click();
    assert.equal(await page.evaluate(() => document.documentElement.lang), language);
  }
  assert.ok(page.url().endsWith("_build/html/tutorials/groups.html"));
});
// Searching finds English and Chinese words.
for (const [address, wanted] of [
  ["search.html?q=belief", /adabelief/],
  ["zh/search.html?q=动量", /rules\/muon/],
  ["zh/search.html?q=学习率调度", /schedules/],
]) {
  const page = await browser.newPage();
  const [path, query] = address.split("?");
  await page.goto(`${pathToFileURL(join(folder, path)).href}?${query}`);
  // The search shows its results one after another.
  await page
    .waitForFunction((wanted) => [...document.querySelectorAll("#search-results li a")].some((x) => wanted.test(x.href)), wanted)
    .catch(() => assert.fail(`no ${wanted} among the results of ${address}`));
  await page.close();
}
await browser.close();
console.log(`docs: ${pages.length} pages, ${links} links`);
