"use strict";
const main = document.getElementById("main");
let tag = "";
async function refresh() {
  try {
    const answer = await fetch({{ live|tojson }}, { headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      const open = [...main.querySelectorAll("details")].map((each) => each.open);
      main.innerHTML = await answer.text();
      main.querySelectorAll("details").forEach((each, index) => { each.open = Boolean(open[index]); });
      tag = answer.headers.get("ETag") || "";
    }
  } catch (problem) {
    // The server was stopped: the page stays as it is.
  }
  setTimeout(refresh, 2000);
}
setTimeout(refresh, 2000);
