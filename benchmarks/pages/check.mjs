// Looks pages over in a headless Chromium: axe-core, console, network, what sticks out; pictures to look at.
//
//   npm install puppeteer-core axe-core        (in any folder; run this script from there)
//   node check.mjs OUTPUT PAGE.html ...        CHROMIUM=/usr/bin/chromium
//
// Ends with 1 where axe-core finds something serious, the console has an error, a page asks for another file, scrolls
// sideways as a whole, or a text of a picture is cut or lies on another.
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.cwd(), "package.json"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [output, ...pages] = process.argv.slice(2);
mkdirSync(output, { recursive: true });

const overlaps = () => {
  const found = [];
  for (const svg of document.querySelectorAll("figure svg[role=img]")) {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`cut: ${text}`);
      for (const [other, place] of boxes.slice(i + 1)) {
        const x = Math.min(box.right, place.right) - Math.max(box.left, place.left);
        const y = Math.min(box.bottom, place.bottom) - Math.max(box.top, place.top);
        if (x > 1 && y > 3) found.push(`on each other: ${text} | ${other}`);
      }
    });
  }
  const width = document.documentElement;
  if (width.scrollWidth > width.clientWidth) found.push(`the page is ${width.scrollWidth} wide, the window ${width.clientWidth}`);
  return found;
};

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
let bad = 0;
for (const file of pages) {
  for (const width of [1200, 400]) for (const scheme of ["light", "dark"]) {
    const page = await browser.newPage();
    const told = [];
    page.on("console", message => ["error", "warn"].includes(message.type()) && told.push(message.text()));
    page.on("pageerror", error => told.push(String(error)));
    page.on("request", request => !/^(file|data):/.test(request.url()) && told.push(`asks for ${request.url()}`));
    await page.setBypassCSP(false);
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.goto(pathToFileURL(path.resolve(file)).href);
    told.push(...(await page.evaluate(overlaps)));
    const first = await page.$("table.sortable thead button");
    if (first) {  // by the keyboard
      await first.focus();
      await page.keyboard.press("Enter");
      const sorted = await page.evaluate(() => document.querySelector("th[aria-sort=ascending]") !== null);
      if (!sorted) told.push("a table is not sorted by Enter on its head");
    }
    const name = `${path.basename(file, ".html")}-${width}-${scheme}`;
    await page.screenshot({ path: path.join(output, `${name}.png`), fullPage: true });
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
    for (const one of found.violations) {
      const serious = ["serious", "critical"].includes(one.impact);
      if (serious) told.push(`${one.impact}: ${one.id}, ${one.nodes.length} times: ${one.nodes[0].html.slice(0, 150)} ${one.nodes[0].failureSummary}`);
      else console.log(`${name}: ${one.impact}: ${one.id}, ${one.nodes.length} times: ${one.nodes[0].html.slice(0, 150)}`);
    }
    console.log(`${name}: ${found.violations.length} of axe-core, ${told.length} wrong`);
    for (const line of told) console.log(`  ${line.slice(0, 300)}`);
    bad += told.length;
    await page.close();
  }
}
await browser.close();
process.exit(bad ? 1 : 0);
