// Validates Kubernetes objects of KEDA and the Prometheus Operator against their schemas. Reads a JSON list on standard input
// and prints one line per object. Exits with status 1 if one is invalid or of an unknown kind. Run it beside node_modules.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const packages = {
  "keda.sh/v1alpha1": "keda",
  "monitoring.coreos.com/v1": "prometheus-operator",
};

let failed = false;
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const { apiVersion, kind } = object;
  try {
    const path = `node_modules/@kubernetes-models/${packages[apiVersion]}/${apiVersion}/index.js`;
    const kinds = await import(pathToFileURL(path));
    new kinds[kind](object).validate();
    console.log(`${apiVersion} ${kind}: valid`);
  } catch (error) {
    failed = true;
    console.log(`${apiVersion} ${kind}: ${error.message}`);
  }
}
process.exit(failed ? 1 : 0);
