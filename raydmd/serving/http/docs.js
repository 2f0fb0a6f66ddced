"use strict";
const KEY = "raydmd-api-key"; // the page at / keeps it under the same name
const $ = (id) => document.getElementById(id);

function withKey(request) {
  const key = sessionStorage.getItem(KEY);
  if (key && !request.headers.Authorization) request.headers.Authorization = `Bearer ${key}`;
  return request;
}

async function load() {
  let answer;
  try {
    answer = await fetch("openapi.json", withKey({ headers: {}, cache: "no-store" }));
  } catch (error) {
    $("note").textContent = "The server cannot be reached.";
    return;
  }
  $("form").hidden = answer.status !== 401;
  if (!answer.ok) {
    const known = answer.status === 401 && !sessionStorage.getItem(KEY);
    $("note").textContent = known ? "" : (await answer.json()).error.message;
    $("key").focus();
    return;
  }
  const spec = await answer.json();
  const root = location.pathname.replace(/\/docs\/?$/, "");
  spec.servers = spec.servers || [{ url: root || "/" }];
  $("note").hidden = true;
  SwaggerUIBundle({ spec, dom_id: "#ui", deepLinking: true, validatorUrl: null, requestInterceptor: withKey });
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  load();
});
load();
