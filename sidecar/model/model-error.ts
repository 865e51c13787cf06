// Why a model cannot be used: the message names the file and the field or tensor, and says what would be
// right.

export class ModelError extends Error {
  override name = "ModelError";
  constructor(
    /** Path of the file at fault. */
    readonly file: string,
    /** Field, tensor or position in it; empty: the file as a whole. */
    readonly field: string,
    reason: string,
  ) {
    super(`${file}: ${field === "" ? "" : `${field}: `}${reason}`);
  }
}
