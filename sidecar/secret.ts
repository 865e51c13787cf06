// The shared secret between sidecar and edges: made once, kept in a file only its owner can read. Loopback is not a
// security boundary: every local user and every browser page reaches 127.0.0.1.

import { randomBytes } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";

/** Reads the secret, or makes one of 256 bits (mode 0600). */
export function loadSecret(path: string): string {
  if (existsSync(path)) {
    const secret = readFileSync(path, "utf8").trim();
    if (secret.length < 32) throw new Error(`${path} holds no usable secret: delete it, and a new one is made`);
    return secret;
  }
  const secret = randomBytes(32).toString("base64url");
  writeFileSync(path, `${secret}\n`, { mode: 0o600, flag: "wx" });
  return secret;
}
