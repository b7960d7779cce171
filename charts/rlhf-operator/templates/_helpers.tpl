{{/* Names that more than one template spells. */}}

{{- define "rlhf.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "rlhf.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- else if contains (include "rlhf.name" .) .Release.Name }}
{{- .Release.Name | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "rlhf.name" .) | trunc 48 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "rlhf.minio" -}}
{{- printf "%s-minio" (include "rlhf.fullname" .) }}
{{- end }}

{{- define "rlhf.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "rlhf.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: name the ServiceAccount to use where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "rlhf.storeSecret" -}}
{{- default (printf "%s-object-store" (include "rlhf.fullname" .)) .Values.objectStore.existingSecret }}
{{- end }}

{{/* MinIO's root: whoever has it may do everything to the bundled store. */}}
{{- define "rlhf.rootSecret" -}}
{{- default (printf "%s-root" (include "rlhf.minio" .)) .Values.minio.existingSecret }}
{{- end }}

{{/* Who uses the store, the release's own user first, as a JSON list of their Secrets and prefixes. */}}
{{- define "rlhf.users" -}}
{{- if and .Values.minio.users (not (include "rlhf.bundledStore" .)) }}
{{- fail "minio.users: the bundled MinIO is not the store; make keys where the store is, and leave this empty" }}
{{- end }}
{{- $own := dict "secret" (include "rlhf.storeSecret" .) "prefix" (include "rlhf.storePrefix" .) }}
{{- $taken := list $own.secret (include "rlhf.rootSecret" .) }}
{{- $found := list $own }}
{{- range .Values.minio.users }}
{{- $prefix := trimAll "/" .prefix }}
{{- if has .secret $taken }}
{{- fail (printf "minio.users: a Secret %s is there already; give each user another" .secret) }}
{{- end }}
{{- if or (not $own.prefix) (hasPrefix (print $own.prefix "/") (print $prefix "/")) (hasPrefix (print $prefix "/") (print $own.prefix "/")) }}
{{- fail (printf "minio.users: prefix %s overlaps with objectStore.prefix %q; the keys of one would reach into the other" $prefix $own.prefix) }}
{{- end }}
{{- $taken = append $taken .secret }}
{{- $found = append $found (dict "secret" .secret "prefix" $prefix) }}
{{- end }}
{{- toJson $found }}
{{- end }}

{{/* The endpoint, empty for AWS. */}}
{{- define "rlhf.storeEndpoint" -}}
{{- if .Values.objectStore.endpoint }}
{{- .Values.objectStore.endpoint }}
{{- else if .Values.minio.enabled }}
{{- printf "http://%s.%s.svc:9000" (include "rlhf.minio" .) .Release.Namespace }}
{{- end }}
{{- end }}

{{- define "rlhf.storePrefix" -}}
{{- trimAll "/" .Values.objectStore.prefix }}
{{- end }}

{{- define "rlhf.storeURL" -}}
{{- $prefix := include "rlhf.storePrefix" . }}
{{- printf "s3://%s" .Values.objectStore.bucket }}{{ if $prefix }}/{{ $prefix }}{{ end }}
{{- end }}

{{- define "rlhf.storePort" -}}
{{- $url := urlParse (include "rlhf.storeEndpoint" . | default "https://s3") }}
{{- if contains ":" $url.host }}{{ regexFind "[0-9]+$" $url.host }}{{ else if eq $url.scheme "http" }}80{{ else }}443{{ end }}
{{- end }}

{{/* Whether the bundled MinIO is the store. */}}
{{- define "rlhf.bundledStore" -}}
{{- if and .Values.minio.enabled (not .Values.objectStore.endpoint) }}true{{ end }}
{{- end }}

{{/* Whether the operator serves the whole cluster. */}}
{{- define "rlhf.clusterWide" -}}
{{- if has "*" .Values.watchNamespaces }}true{{ end }}
{{- end }}

{{/* The namespaces that get a Role, the Secret and the policies of stage pods, as a JSON list. */}}
{{- define "rlhf.namespaces" -}}
{{- if or (include "rlhf.clusterWide" .) (not .Values.watchNamespaces) }}
{{- list .Release.Namespace | toJson }}
{{- else }}
{{- .Values.watchNamespaces | uniq | toJson }}
{{- end }}
{{- end }}

{{/* image: call with (list $ .Values.image) */}}
{{- define "rlhf.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 }}
{{- with $root.Values.imageRegistry }}{{ trimSuffix "/" . }}/{{ end }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{/* labels: call with (list $ "component") */}}
{{- define "rlhf.labels" -}}
{{- $root := index . 0 }}
{{- include "rlhf.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: rlhf-operator
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "rlhf.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "rlhf.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* What rlhf_api.names.STAGE_LABELS puts on every pod of a stage. */}}
{{- define "rlhf.stageSelector" -}}
app.kubernetes.io/name: rlhf-operator
app.kubernetes.io/component: stage
{{- end }}

{{/* The security context of every container of this chart: Pod Security "restricted". */}}
{{- define "rlhf.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "rlhf.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The store's credentials as environment variables. */}}
{{- define "rlhf.storeCredentials" -}}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ include "rlhf.storeSecret" . }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ include "rlhf.storeSecret" . }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}

{{/* The same of the bundled store's root. */}}
{{- define "rlhf.rootCredentials" -}}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ include "rlhf.rootSecret" . }}, key: MINIO_ROOT_USER}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ include "rlhf.rootSecret" . }}, key: MINIO_ROOT_PASSWORD}}
{{- end }}

{{/*
What restarts a pod when the credentials of the values change, which it reads from the Secret as it starts; generated ones
never change, and whoever makes the Secret restarts what reads it. By scrypt: who may read a pod cannot guess from it.
*/}}
{{- define "rlhf.credentialsAnnotation" -}}
{{- $store := .Values.objectStore }}
{{- if and (not $store.existingSecret) (or $store.accessKey $store.secretKey) -}}
checksum/object-store: {{ derivePassword 1 "long" $store.secretKey $store.accessKey (include "rlhf.fullname" .) | sha256sum | trunc 32 }}
{{- end }}
{{- end }}

{{/* The store as arguments of rlhf_store.bucket. */}}
{{- define "rlhf.storeArguments" -}}
- --store={{ include "rlhf.storeURL" . }}
{{- with include "rlhf.storeEndpoint" . }}
- --endpoint={{ . }}
{{- end }}
{{- with .Values.objectStore.region }}
- --region={{ . }}
{{- end }}
{{- end }}

{{/* Egress rules that more than one policy has. */}}
{{- define "rlhf.egressDNS" -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
    - ipBlock: {cidr: 169.254.0.0/16} # a resolver on the node itself
  ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}

{{/* All but the private ranges, where API servers have their addresses. */}}
{{- define "rlhf.publicAddresses" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except: [10.0.0.0/8, 100.64.0.0/10, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16]
- ipBlock: {cidr: "2000::/3"}
{{- end }}

{{- define "rlhf.egressStore" -}}
{{- if include "rlhf.bundledStore" . -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace }}}}
      podSelector:
        matchLabels: {{- include "rlhf.selector" (list . "object-store") | nindent 10 }}
  ports: [{port: 9000}]
{{- else -}}
- to: {{- range .Values.networkPolicy.storeCIDRs }}
    {{- if eq . "public" }}
    {{- include "rlhf.publicAddresses" $ | nindent 4 }}
    {{- else }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  {{- end }}
  ports: [{port: {{ include "rlhf.storePort" . }}}]
{{- end }}
{{- end }}

{{/* What rlhf_operator.operator_settings reads. */}}
{{- define "rlhf.operatorEnvironment" -}}
- {name: RLHF_OPERATOR_IMAGE, value: {{ include "rlhf.image" (list . .Values.pipelineImage) | quote }}}
- {name: RLHF_OPERATOR_IMAGE_PULL_POLICY, value: {{ .Values.pipelineImage.pullPolicy }}}
{{- with .Values.imagePullSecrets }}
- {name: RLHF_OPERATOR_IMAGE_PULL_SECRETS, value: {{ toJson . | squote }}}
{{- end }}
- {name: RLHF_OPERATOR_STORE_BUCKET, value: {{ .Values.objectStore.bucket | quote }}}
- {name: RLHF_OPERATOR_STORE_PREFIX, value: {{ .Values.objectStore.prefix | quote }}}
- {name: RLHF_OPERATOR_STORE_ENDPOINT, value: {{ include "rlhf.storeEndpoint" . | quote }}}
- {name: RLHF_OPERATOR_STORE_REGION, value: {{ .Values.objectStore.region | quote }}}
- {name: RLHF_OPERATOR_STORE_SECRET, value: {{ include "rlhf.storeSecret" . | quote }}}
- {name: RLHF_OPERATOR_STAGE_RESOURCES, value: {{ toJson .Values.stage.resources | squote }}}
- {name: RLHF_OPERATOR_GPU_STAGE_RESOURCES, value: {{ toJson .Values.stage.gpuResources | squote }}}
- {name: RLHF_OPERATOR_EPHEMERAL_STORAGE, value: {{ .Values.stage.ephemeralStorage | quote }}}
- {name: RLHF_OPERATOR_SHARED_MEMORY, value: {{ .Values.stage.sharedMemory | quote }}}
- {name: RLHF_OPERATOR_GRACE_SECONDS, value: {{ .Values.stage.terminationGracePeriodSeconds | quote }}}
- {name: RLHF_OPERATOR_PRIORITY_CLASS, value: {{ .Values.stage.priorityClassName | quote }}}
- {name: RLHF_OPERATOR_WORKERS, value: {{ .Values.operator.workers | quote }}}
{{- if not (include "rlhf.clusterWide" .) }}
- {name: RLHF_OPERATOR_WATCH_NAMESPACE, value: {{ include "rlhf.namespaces" . | fromJsonArray | join "," | quote }}}
{{- end }}
- {name: RLHF_OPERATOR_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: RLHF_OPERATOR_IDENTITY, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
{{- end }}
