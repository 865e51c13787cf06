// The shared secret between sidecar and edges: made once, kept in a file only its owner can read. Loopback is not a
// security boundary: every local user and every browser page reaches 127.0.0.1.

import { randomBytes } from "node:crypto";
import { linkSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";

const SECRET_CHARACTERS_MIN = 32;

/** Reads the secret, or makes one of 256 bits (mode 0600). Two processes that start at once agree on one. */
export function loadSecret(path: string): string {
  const secret = readSecret(path);
  if (secret !== null) return secret;
  // Written whole under another name first: nobody ever reads half a secret.
  const draft = `${path}.${process.pid}`;
  writeFileSync(draft, `${randomBytes(32).toString("base64url")}\n`, { mode: 0o600 });
  try {
    linkSync(draft, path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  } finally {
    rmSync(draft);
  }
  return readSecret(path)!;
}

/** Null when there is no such file. */
function readSecret(path: string): string | null {
  const mode = statSync(path, { throwIfNoEntry: false })?.mode;
  if (mode === undefined) return null;
  if ((mode & 0o077) !== 0) {
    throw new Error(`${path} can be read by other users: delete it for a new secret, or chmod 600 it`);
  }
  const secret = readFileSync(path, "utf8").trim();
  if (secret.length < SECRET_CHARACTERS_MIN) {
    throw new Error(`${path} holds no usable secret: delete it, and a new one is made`);
  }
  return secret;
}
