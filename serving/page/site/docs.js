// The interface document in Swagger's page. The document needs a key where the service does; this page does not.
import { ServiceError, ask, currentKey, useKey } from "./service.js";

const form = document.getElementById("key-form");
const problem = document.getElementById("problem");

async function show() {
  problem.textContent = "";
  let spec;
  try {
    spec = await ask("openapi.json");
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    form.hidden = error.status !== 401;
    problem.textContent = error.status === 401 && !currentKey() ? "" : error.message;
    return;
  }
  form.hidden = true;
  window.SwaggerUIBundle({
    spec,
    domNode: document.getElementById("interface"),
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    tryItOutEnabled: true,
    // A validator on another host would be asked otherwise.
    validatorUrl: null,
    requestInterceptor: (request) => {
      if (currentKey()) request.headers.Authorization = `Bearer ${currentKey()}`;
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(document.getElementById("key").value.trim());
  show();
});
show();
