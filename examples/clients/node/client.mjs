// Asks a running Weft server for text, in one message or as it is generated.

import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTOS = fileURLToPath(new URL('../../../protos', import.meta.url));
const DEADLINE_MS = 60_000;

const { values, positionals } = parseArgs({ options: { stream: { type: 'boolean' } }, allowPositionals: true });
const [address, text, adapterId] = positionals;
if (text === undefined || positionals.length > 3) {
  console.error('usage: node client.mjs [--stream] ADDRESS PROMPT [ADAPTER]');
  process.exit(2);
}

const definition = protoLoader.loadSync('weft/v1/inference.proto', { includeDirs: [PROTOS], enums: String, defaults: true });
const { InferenceService } = grpc.loadPackageDefinition(definition).weft.v1;
const client = new InferenceService(address, grpc.credentials.createInsecure());

const request = { adapterId, text, stopping: { maxTokens: 64 } };
const options = { deadline: Date.now() + DEADLINE_MS };

const generate = () =>
  new Promise((resolve, reject) => {
    client.generate(request, options, (error, response) => (error ? reject(error) : resolve(response)));
  });

async function stream() {
  let last;
  for await (last of client.streamGenerate(request, options)) process.stdout.write(last.text);
  process.stdout.write('\n');
  return last;
}

try {
  const response = await (values.stream ? stream() : generate());
  if (!values.stream) console.log(response.text);
  console.error(`${response.finishReason}, ${response.usage.completionTokens} tokens`);
} catch (error) {
  console.error(`${grpc.status[error.code] ?? 'ERROR'}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
