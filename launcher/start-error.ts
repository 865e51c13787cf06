// A start that cannot work. The message is one line for the person who typed the command: what is wrong, and
// what to do.

export class StartError extends Error {
  override name = "StartError";
}
